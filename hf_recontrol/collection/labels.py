"""Responses to scored responses, in memory or in their folder: rewards are called, and what they return is checked."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.fingerprints import file_checksum
from ..data.processes import Progress, progress_bar
from ..data.prompts import BadRow, Prompts, report_bad_rows
from ..data.rollouts import Rollout, count_rollouts, load_rollouts, save_rollouts, scoring_of
from ..data.stage_folder import MANIFEST_NAME, StageFolder, read_manifest
from .rewards import MissingColumnError, RewardFunction, by_name, reward_column, reward_fingerprint, reward_name


def finite_reward(value: Any) -> float | None:
    """The reward as a float, or `None` where it is no finite number."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, np.generic):
        value = value.item()
    try:
        # Training computes in float32.
        return float(value) if isinstance(value, Real) and abs(value) <= torch.finfo(torch.float32).max else None
    except OverflowError:
        return None


def check_columns(specs: Sequence[str], prompts: Prompts) -> None:
    """
    Check the columns that rewards name, before any response is sampled.

    Raises:
        `ValueError`: if there is no such column, or it holds something that is no finite number; names the rows.
    """
    for column in (reward_column(spec, prompts.rows[0]) for spec in specs):
        if column is None:
            continue
        if column not in prompts.rows[0]:
            raise MissingColumnError(f"The data have no column {column!r}, they have {sorted(prompts.rows[0])}.")
        bad = [
            BadRow(f"prompt {number}", f"the column {column} holds {row[column]!r}, expected a finite number")
            for number, row in zip(prompts.numbers, prompts.rows, strict=True)
            if finite_reward(row[column]) is None
        ]
        report_bad_rows(bad, "error")


def score_rollouts(
    rollouts: Sequence[Rollout], *rewards: RewardFunction, on_bad_rows: str = "error", source: str = "rollouts"
) -> list[Rollout]:
    """
    Rollouts with their rewards, one for each function (one objective each). What is scored is the completion as it is
    stored, cut where the turn ends.

    Args:
        on_bad_rows (`str`, *optional*, defaults to `"error"`):
            What to do when a reward is no finite number: `"error"`, or `"skip"`, which leaves the rollout's reward
            `None` (it is then not trained on) and warns.
        source (`str`, *optional*):
            Where the rollouts are from, for messages.

    Raises:
        `ValueError`: if there is nothing to score, or a function returns a wrong number of rewards, or one that is no
        finite number; names the function and the row. `RuntimeError`: if a function itself fails.
    """
    if not rollouts or not rewards:
        raise ValueError(f"Nothing to score: {len(rollouts)} rollouts, {len(rewards)} reward functions.")
    # A function's own arguments are not the data's to give.
    names = {name for rollout in rollouts for name in rollout.columns} - {"prompts", "completions"}
    columns = {name: [rollout.columns.get(name) for rollout in rollouts] for name in sorted(names)}
    prompts, completions = [r.prompt for r in rollouts], [r.completion for r in rollouts]
    scores, bad = [], []
    for function in rewards:
        name = reward_name(function)
        try:
            # Copies: a function may change what it is given, and the next one must not see that, nor the file.
            values = list(function(*copy.deepcopy((prompts, completions)), **copy.deepcopy(columns)))
        except (ImportError, MissingColumnError):
            raise  # each says what to do
        except Exception as error:
            raise RuntimeError(f"The reward {name} failed: {type(error).__name__}: {error}") from error
        if len(values) != len(rollouts):
            raise ValueError(f"The reward {name} returned {len(values)} values for {len(rollouts)} responses.")
        finite = [finite_reward(value) for value in values]
        bad += [
            BadRow(f"{source}, row {row}", f"the reward {name} returned {values[row]!r}, expected a finite number")
            for row, value in enumerate(finite)
            if value is None
        ]
        scores.append(finite)
    report_bad_rows(bad, on_bad_rows)
    return [
        replace(rollout, reward=None if None in values else list(values))
        for rollout, *values in zip(rollouts, *scores, strict=True)
    ]


def label_rollouts(
    folder: str | os.PathLike,
    rewards: dict[str, RewardFunction] | Sequence[RewardFunction],
    *,
    again: bool = False,
    on_bad_rows: str = "error",
    progress: Progress | None = None,
) -> dict[str, float]:
    """
    Score the rollouts of a folder, file by file, in place: each file is replaced by itself with rewards. A run that
    was stopped resumes there. Under `accelerate launch` the processes share the files.

    Args:
        folder (`str` or `os.PathLike`):
            A finished folder of [`write_rollouts`].
        rewards (`dict[str, RewardFunction]`, or sequence of functions):
            The rewards, one objective each, by their names.
        again (`bool`, *optional*, defaults to `False`):
            Replace the rewards of an earlier scoring. The same call resumes one that was stopped.
        on_bad_rows (`str`, *optional*, defaults to `"error"`):
            As for [`score_rollouts`].
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total) instead of showing a bar.

    Returns:
        Counts: those of the rollouts, `unscored`, and the sum of each reward, `reward NAME`.

    Raises:
        `ValueError`: as [`score_rollouts`]; if the rollouts have other rewards already (also those of a function of
        the same name whose source differs) and `again` is not set; if a file is damaged. `OSError`: as
        [`read_manifest`].
    """
    if not isinstance(rewards, dict):
        rewards = by_name(rewards)
    folder, names = Path(folder), list(rewards)
    wanted = {"rewards": names, "fingerprints": [reward_fingerprint(function) for function in rewards.values()]}
    known = read_manifest(folder, "rollouts", "recontrol rollout", complete=False)
    stage = StageFolder(folder, "rollouts", known["settings"], known["num_parts"], ".parquet")
    with stage:
        scorings = [scoring_of(path) for path in map(stage.part_path, range(stage.num_parts)) if path.is_file()]
        if len(scorings) < stage.num_parts:
            raise ValueError(f"The rollouts in {folder} are not finished: run the same `recontrol rollout` again.")
        scoring = known.get("scoring", 0)
        found = {name: known.get(name) for name in wanted}
        if scoring in scorings and found != wanted and not again:
            raise ValueError(_other_rewards(folder, found, wanted))
        finished = known["complete"] and known.get("rewards") is not None
        if finished and not again:
            return stage.counts()
        if found != wanted or finished:
            scoring = max((number for number in scorings if number is not None), default=-1) + 1
        stage.processes.wait()
        if stage.processes.index == 0:
            stage.write_manifest(known | {"complete": False, "scoring": scoring} | wanted)
        stage.processes.wait()
        total = sum(count_rollouts(stage.part_path(index)) for index in stage.own_parts())
        with progress_bar("rewards", total, progress, stage.processes.index) as advance:
            for index in stage.own_parts():
                path = stage.part_path(index)
                if (known["complete"] or scorings[index] is None) and file_checksum(path) != known["parts"].get(
                    path.name
                ):
                    raise ValueError(f"{path} was changed or damaged: it is not what its {MANIFEST_NAME} names.")
                rollouts = load_rollouts(path)
                if scorings[index] != scoring and rollouts:
                    scored = score_rollouts(rollouts, *rewards.values(), on_bad_rows=on_bad_rows, source=path.name)
                    save_rollouts(scored, path, names, scoring)
                advance(len(rollouts))
        kept = {"bad_rows": known.get("bad_rows", 0)} | {key: known.get(key) for key in ("dataset", "head_sources")}
        return stage.finish(partial(_count_scored, names=names), kept | {"scoring": scoring} | wanted)


def _other_rewards(folder: Path, found: dict[str, list], wanted: dict[str, list]) -> str:
    remedy = "Name another folder, or replace the rewards: `recontrol label --again` (`again=True`)."
    if found["rewards"] == wanted["rewards"]:
        return (
            f"The rollouts in {folder} were scored with {found['rewards']}, but its source or weights are others now. "
            f"{remedy}"
        )
    return (
        f"The rollouts in {folder} were scored with another reward (there {found['rewards']}, now "
        f"{wanted['rewards']}). {remedy}"
    )


def _count_scored(path: Path, names: Sequence[str]) -> dict[str, float]:
    rollouts = load_rollouts(path)
    scored = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "rollouts": len(rollouts),
        "finished": sum(rollout.finished for rollout in rollouts),
        "tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
        "unscored": len(rollouts) - len(scored),
    } | {f"reward {name}": sum(reward[k] for reward in scored) for k, name in enumerate(names)}
