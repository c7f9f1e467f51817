"""Responses to scored responses, in memory or in their folder: rewards are called, and what they return is checked."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..data.fingerprints import file_checksum
from ..data.processes import Progress, progress_bar
from ..data.prompts import BadRow, Prompts, report_bad_rows
from ..data.rollouts import Rollout, columns_of, count_rollouts, load_rollouts, save_rollouts, scored_by, scoring_of
from ..data.stage_folder import MANIFEST_NAME, StageFolder, read_manifest
from ..settings import LabelSettings
from ..utils.checks import check_choice
from ..utils.code_fingerprints import UnknownStateError
from .classifiers import ClassifierReward
from .rewards import (
    ColumnReward,
    RewardFunction,
    by_name,
    call_reward,
    check_reward,
    note_calls,
    reward_fingerprint,
    reward_name,
)

logger = logging.get_logger(__name__)

# The answer that rewards are tried on before any is sampled.
_TRIED = "I do not know."


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


def check_rows(
    rewards: dict[str, RewardFunction], prompts: Prompts, on_bad_rows: str, combine_rewards: str = "none"
) -> None:
    """
    Check what is known of each row's reward before any response is sampled: that a column holds it, and that the chat
    template of a classifier takes the chat.

    Args:
        on_bad_rows (`str`):
            `"error"`; with `"skip"` nothing is checked, since scoring leaves such rows out.

    Raises:
        `ValueError`: if not; names the rows.
    """
    if on_bad_rows != "error":
        return
    bad = []
    for function in rewards.values():
        for number, row in zip(prompts.numbers, prompts.rows, strict=True):
            reason = _known_fault(function, row, combine_rewards)
            if reason is not None:
                bad.append(BadRow(f"prompt {number}", reason))
    report_bad_rows(bad, "error")


def _known_fault(function: RewardFunction, row: dict[str, Any], combine_rewards: str) -> str | None:
    if isinstance(function, ColumnReward):
        value = row.get(function.column)
        is_routed = value is None and combine_rewards != "none"
        if finite_reward(value) is None and not is_routed:
            return f"the column {function.column} holds {value!r}, expected a finite number"
    elif isinstance(function, ClassifierReward):
        try:
            function.encode(row["prompt"], _TRIED)
        except ValueError as error:
            return str(error)
    return None


def try_rewards(rewards: dict[str, RewardFunction], prompts: Prompts, on_bad_rows: str) -> None:
    """
    Call each reward function once, before any response is sampled, on a made-up answer to the first two prompts.

    Raises:
        `ValueError`, `RuntimeError`: as [`score_rollouts`].
    """
    rewards = {name: function for name, function in rewards.items() if not isinstance(function, ColumnReward)}
    tried = [
        Rollout(row["prompt"], _TRIED, [0], [0], True, columns={key: row[key] for key in row if key != "prompt"})
        for row in prompts.rows[:2]
    ]
    fingerprints, unknown = _fingerprints(rewards)
    if unknown:
        logger.warning(unknown)
    try:
        with _noting_calls(rewards, fingerprints):
            _, bad = _called(tried, list(rewards.values()), "the first prompts")
        if on_bad_rows == "error":
            report_bad_rows(list(bad.values()), on_bad_rows)
    except (RuntimeError, ValueError) as error:
        said = f"{error} (Each reward is tried before sampling, on the answer {_TRIED!r}.)"
        raise type(error)(said) from error.__cause__ or error


@contextmanager
def _noting_calls(rewards: dict[str, RewardFunction], fingerprints: Sequence[str | None]) -> Iterator[None]:
    """Around calls of rewards that had these fingerprints before, see [`note_calls`]."""
    try:
        yield
    finally:
        for function, fingerprint in zip(rewards.values(), fingerprints, strict=True):
            note_calls(function, fingerprint)


def score_rollouts(
    rollouts: Sequence[Rollout],
    *rewards: RewardFunction,
    on_bad_rows: str = "error",
    combine_rewards: str = "none",
    source: str = "rollouts",
) -> list[Rollout]:
    """
    Rollouts with their rewards. What is scored is the completion as it is stored, cut where the turn ends.

    Args:
        rewards (`Callable`):
            Reward functions, see [`RewardFunction`].
        on_bad_rows (`str`, *optional*, defaults to `"error"`):
            What to do when a reward is neither a finite number nor `None`: `"error"`, or `"skip"`, which leaves the
            rollout's reward `None` (it is then not trained on) and warns.
        combine_rewards (`str`, *optional*, defaults to `"none"`):
            `"none"`: each function is one objective, and a rollout that one of them does not score (it returns `None`)
            gets no reward. `"mean"`, `"sum"`: one objective, of the functions that score a rollout.
        source (`str`, *optional*):
            Where the rollouts are from, for messages.

    Raises:
        `ValueError`: if there is nothing to score; if a function cannot be called with what the rollouts have, returns
        a wrong number of rewards, or one that is no finite number (names the function and the row); if no rollout gets
        a reward. `RuntimeError`: if a function itself fails.
    """
    check_choice("combine_rewards", combine_rewards, LabelSettings.choices("combine_rewards"))
    if not rollouts or not rewards:
        raise ValueError(f"Nothing to score: {len(rollouts)} rollouts, {len(rewards)} reward functions.")
    scored, counts = scored_rollouts(rollouts, rewards, on_bad_rows, combine_rewards, source)
    names = [reward_name(function) for function in rewards]
    unscored = sum(rollout.reward is None for rollout in scored)
    left_out = _unscored(list(zip(names, counts, strict=True)), unscored, len(scored), combine_rewards)
    if left_out:
        logger.warning(left_out)
    return scored


def scored_rollouts(
    rollouts: Sequence[Rollout],
    rewards: Sequence[RewardFunction],
    on_bad_rows: str,
    combine_rewards: str,
    source: str,
) -> tuple[list[Rollout], list[int]]:
    """(rollouts with their rewards, how many of them each function scored)."""
    scores, bad = _called(rollouts, rewards, source)
    report_bad_rows(list(bad.values()), on_bad_rows)
    found = [
        replace(rollout, reward=None if row in bad else _reward_of(values, combine_rewards))
        for row, (rollout, *values) in enumerate(zip(rollouts, *scores, strict=True))
    ]
    return found, [sum(value is not None for value in values) for values in scores]


def _called(
    rollouts: Sequence[Rollout], rewards: Sequence[RewardFunction], source: str
) -> tuple[list[list[float | None]], dict[int, BadRow]]:
    """(what each function says of each rollout, which rollouts got something that is no finite number)."""
    names = {name for rollout in rollouts for name in rollout.columns}
    columns = {name: [rollout.columns.get(name) for rollout in rollouts] for name in sorted(names)}
    for function in rewards:
        check_reward(function, names)
    prompts, completions, ids = zip(*[(r.prompt, r.completion, r.completion_ids) for r in rollouts], strict=True)
    scores, bad = [], {}
    for function in rewards:
        name = reward_name(function)
        values = call_reward(function, list(prompts), list(completions), list(ids), columns)
        scores.append([finite_reward(value) for value in values])
        for row, value in enumerate(values):
            if value is not None and scores[-1][row] is None:
                said = f"returned {value!r}, expected a finite number"
                reason = f"the reward {name}: {value}" if isinstance(value, Exception) else f"the reward {name} {said}"
                bad[row] = BadRow(f"{source}, row {row}", reason)
    return scores, dict(sorted(bad.items()))


def _reward_of(values: Sequence[float | None], combine_rewards: str) -> list[float] | None:
    """A rollout's reward for each objective, from what each function says of it."""
    known = [value for value in values if value is not None]
    if combine_rewards == "none":
        return known if len(known) == len(values) else None
    return [sum(known) / (len(known) if combine_rewards == "mean" else 1)] if known else None


def _unscored(scored: Sequence[tuple[str, int]], unscored: int, total: int, combine_rewards: str) -> str | None:
    """What to say of responses without a reward; raises where no response has one."""
    for name, count in scored:
        if count == 0:
            raise ValueError(f"The reward {name} scored none of the {total} responses: it gave no number for any.")
    counts = ", ".join(f"{name} scored {count}" for name, count in scored)
    if unscored == total and combine_rewards == "none":
        raise ValueError(
            f"None of the {total} responses was scored by every reward ({counts}), so there is nothing to learn from. "
            "Where each reward scores only its own rows, let them make one reward: `combine_rewards='mean'` or 'sum' "
            "(`--combine-rewards mean`)."
        )
    if unscored == total:
        raise ValueError(f"None of the {total} responses has a usable reward ({counts}).")
    return f"{unscored} of {total} responses have no reward and are left out ({counts})." if unscored else None


def label_rollouts(
    folder: str | os.PathLike,
    rewards: dict[str, RewardFunction] | Sequence[RewardFunction],
    *,
    again: bool = False,
    on_bad_rows: str = "error",
    combine_rewards: str = "none",
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
        on_bad_rows (`str`, *optional*, defaults to `"error"`), combine_rewards (*optional*, defaults to `"none"`):
            As for [`score_rollouts`].
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total) instead of showing a bar.

    Returns:
        Counts: those of the rollouts, `unscored`, the sum of each objective, `reward NAME`, and how many responses
        each function scored, `scored NAME`.

    Raises:
        `ValueError`: as [`score_rollouts`]; if the rollouts have other rewards already (also those of a function of
        the same name that does or holds something else) and `again` is not set; if a file is damaged. `OSError`: as
        [`read_manifest`].
    """
    if not isinstance(rewards, dict):
        rewards = by_name(rewards)
    check_choice("combine_rewards", combine_rewards, LabelSettings.choices("combine_rewards"))
    if not rewards:
        raise ValueError("No reward is given, so there is nothing to score with.")
    folder, names = Path(folder), list(rewards)
    if combine_rewards != "none" and len(names) > 1:
        names = [f"{combine_rewards} of {', '.join(names)}"]
    fingerprints, unknown = _fingerprints(rewards)
    wanted = {"rewards": names, "fingerprints": fingerprints}
    known = read_manifest(folder, "rollouts", "recontrol rollout", complete=False)
    stage = StageFolder(folder, "rollouts", known["settings"], known["num_parts"], ".parquet")
    with stage:
        scorings = [scoring_of(path) for path in map(stage.part_path, range(stage.num_parts)) if path.is_file()]
        if len(scorings) < stage.num_parts:
            raise ValueError(f"The rollouts in {folder} are not finished: run the same `recontrol rollout` again.")
        scoring = known.get("scoring", 0)
        found = {name: known.get(name) for name in wanted}
        if scoring in scorings and (found != wanted or unknown) and not again:
            raise ValueError(_other_rewards(folder, found, wanted, unknown))
        finished = known["complete"] and known.get("rewards") is not None
        if finished and not again:
            return stage.counts()
        columns = columns_of(map(stage.part_path, range(stage.num_parts)))
        for function in rewards.values():
            check_reward(function, columns)
        if found != wanted or finished:
            scoring = max((number for number in scorings if number is not None), default=-1) + 1
        stage.processes.wait()
        if stage.processes.index == 0:
            stage.write_manifest(known | {"complete": False, "scoring": scoring} | wanted)
        stage.processes.wait()
        if unknown and stage.processes.index == 0:
            logger.warning(unknown)
        with _noting_calls(rewards, fingerprints):
            _score_parts(stage, known, scorings, scoring, rewards, names, on_bad_rows, combine_rewards, progress)
        kept = {"bad_rows": known.get("bad_rows", 0)} | {key: known.get(key) for key in ("dataset", "head_sources")}
        counts = stage.finish(partial(_count_scored, names=names), kept | {"scoring": scoring} | wanted)
        scored = [(name, counts.get(f"scored {name}", 0)) for name in rewards]
        try:
            left_out = _unscored(scored, counts["unscored"], counts["rollouts"], combine_rewards)
        except ValueError:
            # They count as not scored, so that other rewards need no `again`.
            if stage.processes.index == 0:
                manifest = read_manifest(folder, "rollouts", "recontrol rollout")
                stage.write_manifest(manifest | dict.fromkeys(wanted) | {"scoring": scoring + 1})
            stage.processes.wait()
            raise
        if left_out and stage.processes.index == 0:
            logger.warning(left_out)
        return counts


def _score_parts(
    stage: StageFolder,
    known: dict[str, Any],
    scorings: Sequence[int | None],
    scoring: int,
    rewards: dict[str, RewardFunction],
    names: Sequence[str],
    on_bad_rows: str,
    combine_rewards: str,
    progress: Progress | None,
) -> None:
    """Score the parts of this process that this scoring has not reached yet."""
    total = sum(count_rollouts(stage.part_path(index)) for index in stage.own_parts())
    with progress_bar("rewards", total, progress, stage.processes.index) as advance:
        for index in stage.own_parts():
            path = stage.part_path(index)
            untouched = known["complete"] or scorings[index] is None
            if untouched and file_checksum(path) != known["parts"].get(path.name):
                raise ValueError(f"{path} was changed or damaged: it is not what its {MANIFEST_NAME} names.")
            rollouts = load_rollouts(path)
            if scorings[index] != scoring and rollouts:
                scored, counts = scored_rollouts(
                    rollouts, list(rewards.values()), on_bad_rows, combine_rewards, path.name
                )
                save_rollouts(scored, path, names, scoring, dict(zip(rewards, counts, strict=True)))
            advance(len(rollouts))


def _fingerprints(rewards: dict[str, RewardFunction]) -> tuple[list[str | None], str]:
    """(what tells each reward from others, `None` where that cannot be known; what to say of those, or nothing)."""
    fingerprints, unknown = [], []
    for name, function in rewards.items():
        try:
            fingerprints.append(reward_fingerprint(function))
        except UnknownStateError as error:
            fingerprints.append(None)
            unknown.append(
                f"Whether the reward {name} is still the same cannot be known later: it holds {error}. Give it a text "
                f"of your own that changes when it does: `{name}.fingerprint = 'version 1'`."
            )
    return fingerprints, " ".join(unknown)


def _other_rewards(folder: Path, found: dict[str, list], wanted: dict[str, list], unknown: str) -> str:
    remedy = (
        f"Name another folder, or replace the rewards: `recontrol label {folder} --reward ... --again` "
        "(`again=True`). What was made of the old ones must go too: in a folder of `recontrol fit` remove `states` "
        "and `head`, then run the same `fit` with the new rewards."
    )
    if found["rewards"] == wanted["rewards"] and unknown:
        return f"The rollouts in {folder} were scored with {found['rewards']}. {unknown} {remedy}"
    if found["rewards"] == wanted["rewards"]:
        return (
            f"The rollouts in {folder} were scored with {found['rewards']}, but its code (or Python's release), what "
            f"it holds, or its weights are others now. {remedy}"
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
        **{f"reward {name}": sum(reward[k] for reward in scored) for k, name in enumerate(names)},
        **{f"scored {name}": count for name, count in scored_by(path).items()},
    }
