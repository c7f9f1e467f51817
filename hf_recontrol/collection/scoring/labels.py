"""Responses to scored responses, in their folder: file by file, and resumed after any stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ...data.processes import Progress, progress_bar
from ...data.rollouts import (
    Rollout,
    columns_of,
    count_rollouts,
    load_rollouts,
    save_rollouts,
    scored_by,
    scoring_of,
)
from ...data.stage_folder import StageFolder, hold_parts, made_by, read_manifest
from ...settings import ScoringSettings
from ...utils.checks import check_choice
from .responses import (
    NO_PREFIX,
    check_parts,
    check_prefixes,
    fingerprints_of,
    noting_calls,
    scored_rollouts,
    what_is_left_out,
)
from .rewards import RewardFunction, check_reward, named_rewards, objective_names

logger = logging.get_logger(__name__)


def label_rollouts(
    folder: str | os.PathLike,
    rewards: dict[str, RewardFunction] | str | RewardFunction | Sequence[str | RewardFunction],
    *,
    again: bool = False,
    on_bad_rows: str = "error",
    combine_rewards: str = "none",
    prefix_every: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """
    Score the rollouts of a folder, file by file, in place: each file is replaced by itself with rewards. A run that
    was stopped resumes there. Under `accelerate launch` the processes share the files.

    Args:
        folder (`str` or `os.PathLike`):
            A finished folder of [`write_rollouts`].
        rewards (`str`, function, sequence of these, or `dict[str, RewardFunction]`):
            As for [`load_reward`], or functions, one objective each; or functions by the names that they are to have.
        again (`bool`, *optional*, defaults to `False`):
            Replace the rewards of an earlier scoring. The same call resumes one that was stopped.
        on_bad_rows, combine_rewards, prefix_every, tokenizer (*optional*):
            As for [`score_rollouts`].
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total) instead of showing a bar.

    Returns:
        Counts: those of the rollouts, `unscored`, `prefixes` (responses so far that have a reward), the sum of each
        objective, `reward NAME`, and how many responses each function scored, `scored NAME`.

    Raises:
        `ValueError`: as [`score_rollouts`]; if the rollouts have other rewards already (also those of a function of
        the same name that does or holds something else) and `again` is not set; if a file is damaged. Of a function
        of which that cannot be known a finished scoring is kept, with a warning, and one that was stopped is refused.
        `OSError`: as [`read_manifest`].
    """
    check_choice("combine_rewards", combine_rewards, ScoringSettings.choices("combine_rewards"))
    check_prefixes(prefix_every, tokenizer)
    if not rewards:
        raise ValueError("No reward is given, so there is nothing to score with.")
    folder = Path(folder)
    known = read_manifest(folder, "rollouts", "recontrol rollout", complete=False)
    if not isinstance(rewards, dict):
        rewards = named_rewards(rewards, columns_of(sorted(folder.glob("part-*.parquet"))))
    check_parts(rewards.values(), prefix_every)
    names = objective_names(list(rewards), combine_rewards)
    fingerprints, unknown = fingerprints_of(rewards)
    wanted = {"rewards": names, "fingerprints": fingerprints, "prefix_every": prefix_every}
    stage = StageFolder(folder, "rollouts", known["settings"], known["num_parts"], ".parquet")
    with stage:
        scorings = [scoring_of(path) for path in map(stage.part_path, range(stage.num_parts)) if path.is_file()]
        if len(scorings) < stage.num_parts or not {"counts", "parts"} <= known.keys():
            raise ValueError(
                f"The rollouts in {folder} are not finished: run the same command again (`recontrol rollout`, or "
                "`fit`)."
            )
        scoring = known.get("scoring", 0)
        found = {name: known.get(name) for name in wanted}
        finished = known["complete"] and known.get("rewards") is not None
        # What cannot be known to be the same reward must not go on with half of the responses; all are of one reward.
        if scoring in scorings and (found != wanted or (unknown and not finished)) and not again:
            raise ValueError(_other_rewards(folder, found, wanted, unknown, combine_rewards))
        if finished and not again:
            if unknown and stage.processes.index == 0:
                logger.warning(f"The scores in {folder} are kept. {unknown}")
            return stage.counts()
        columns = columns_of(map(stage.part_path, range(stage.num_parts)))
        for function in rewards.values():
            check_reward(function, columns)
        paths = map(stage.part_path, range(stage.num_parts))
        untouched = [
            path.name for path, found_in in zip(paths, scorings, strict=True) if known["complete"] or found_in is None
        ]
        expected = {name: known["parts"].get(name) for name in untouched}
        hold_parts(folder, expected, made_by("recontrol rollout"), stage.processes)
        # What is not known to be the same reward must not go on where another one stopped.
        if found != wanted or finished or unknown:
            scoring = max((number for number in scorings if number is not None), default=-1) + 1
        stage.processes.wait()
        if stage.processes.index == 0:
            stage.write_manifest(known | {"complete": False, "scoring": scoring} | wanted)
        stage.processes.wait()
        if unknown and stage.processes.index == 0:
            logger.warning(unknown)
        with noting_calls(rewards, fingerprints):
            score = partial(
                scored_rollouts,
                rewards=list(rewards.values()),
                on_bad_rows=on_bad_rows,
                combine_rewards=combine_rewards,
                prefix_every=prefix_every,
                tokenizer=tokenizer,
            )
            _score_parts(stage, scorings, scoring, list(rewards), names, score, progress)
        kept = {"bad_rows": known.get("bad_rows", 0)} | {key: known.get(key) for key in ("dataset", "head_sources")}
        counts = stage.finish(partial(_count_scored, names=names), kept | {"scoring": scoring} | wanted)
        scored = [(name, counts.get(f"scored {name}", 0)) for name in rewards]
        try:
            left_out = what_is_left_out(scored, counts["unscored"], counts["rollouts"], combine_rewards)
        except ValueError:
            # They count as not scored, so that other rewards need no `again`.
            if stage.processes.index == 0:
                manifest = read_manifest(folder, "rollouts", "recontrol rollout")
                stage.write_manifest(manifest | dict.fromkeys(wanted) | {"scoring": scoring + 1})
            stage.processes.wait()
            raise
        if left_out and stage.processes.index == 0:
            logger.warning(left_out)
        if prefix_every is not None and not counts["prefixes"] and stage.processes.index == 0:
            logger.warning(NO_PREFIX)
        return counts


def _score_parts(
    stage: StageFolder,
    scorings: Sequence[int | None],
    scoring: int,
    rewards: Sequence[str],
    names: Sequence[str],
    score: Callable[..., tuple[list[Rollout], list[int]]],
    progress: Progress | None,
) -> None:
    """Score the parts of this process that this scoring has not reached yet."""
    total = sum(count_rollouts(stage.part_path(index)) for index in stage.own_parts())
    with progress_bar("rewards", total, progress, stage.processes.index) as advance:
        for index in stage.own_parts():
            path = stage.part_path(index)
            rollouts = load_rollouts(path)
            if scorings[index] != scoring and rollouts:
                scored, counts = score(rollouts, source=path.name)
                save_rollouts(scored, path, names, scoring, dict(zip(rewards, counts, strict=True)))
            advance(len(rollouts))


def _other_rewards(
    folder: Path, found: dict[str, Any], wanted: dict[str, Any], unknown: str, combine_rewards: str
) -> str:
    options = "" if wanted["prefix_every"] is None else f"--prefix-every {wanted['prefix_every']} "
    options += "" if combine_rewards == "none" else f"--combine-rewards {combine_rewards} "
    remedy = (
        f"Name another folder, or replace the rewards: `recontrol label {folder} --reward ... {options}--again` "
        "(`again=True`). What was made of the old ones must go too: in a folder of `recontrol fit` remove `states` "
        "and `head`, then run the same `fit` with the new rewards."
    )
    if found["prefix_every"] != wanted["prefix_every"] and found["rewards"] == wanted["rewards"]:
        return (
            f"The rollouts in {folder} were scored with prefix_every={found['prefix_every']}, now it is "
            f"{wanted['prefix_every']}. {remedy}"
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
        "prefixes": sum(len(rollout.prefix_tokens or ()) for rollout in rollouts),
        **{f"reward {name}": sum(reward[k] for reward in scored) for k, name in enumerate(names)},
        **{f"scored {name}": count for name, count in scored_by(path).items()},
    }
