"""Responses to scored responses, in memory: rewards are called, and what they return is checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ...data.prompts import BadRow, Prompts, report_bad_rows
from ...data.rollouts import Rollout, is_decoded_by, numbers_so_far, responses_so_far
from ...settings import ScoringSettings
from ...utils.checks import check_choice, check_int
from ...utils.code_fingerprints import UnknownStateError
from .classifiers import ClassifierReward
from .rewards import (
    ColumnReward,
    RewardFunction,
    call_reward,
    check_reward,
    note_calls,
    reward_fingerprint,
    reward_name,
)

logger = logging.get_logger(__name__)

# What is said where `prefix_every` gave nothing.
NO_PREFIX = (
    "No response so far has a reward (`prefix_every`): the rewards give none for part of a text, or no response is so "
    "long. What is trained is the same as without."
)
# Parts of responses in one call, at least.
_PARTS_AT_ONCE = 32
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
        for index, row in enumerate(prompts.rows):
            reason = _known_fault(function, row, combine_rewards)
            if reason is not None:
                bad.append(BadRow(prompts.place(index), reason))
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


def try_rewards(
    rewards: dict[str, RewardFunction], prompts: Prompts, on_bad_rows: str, prefix_every: int | None = None
) -> None:
    """
    Call each reward function once, before any response is sampled, on a made-up answer to the first two prompts; with
    `prefix_every` on half of it too.

    Raises:
        `ValueError`, `RuntimeError`: as [`score_rollouts`].
    """
    rewards = {name: function for name, function in rewards.items() if not isinstance(function, ColumnReward)}
    tried = [
        Rollout(row["prompt"], _TRIED, [0], [0], True, columns={key: row[key] for key in row if key != "prompt"})
        for row in prompts.rows[:2]
    ]
    fingerprints, unknown = fingerprints_of(rewards)
    if unknown:
        logger.warning(unknown)
    try:
        with noting_calls(rewards, fingerprints):
            _, bad = called_rewards(tried, list(rewards.values()), "the first prompts")
            if prefix_every is not None:
                half = [replace(rollout, completion=_TRIED[: len(_TRIED) // 2]) for rollout in tried]
                _called_so_far(half, list(rewards.values()), "the first prompts")
        if on_bad_rows == "error":
            report_bad_rows(list(bad.values()), on_bad_rows)
    except (RuntimeError, ValueError) as error:
        said = f"{error} (Each reward is tried before sampling, on the answer {_TRIED!r}.)"
        raise type(error)(said) from error.__cause__ or error


@contextmanager
def noting_calls(rewards: dict[str, RewardFunction], fingerprints: Sequence[str | None]) -> Iterator[None]:
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
    prefix_every: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
        prefix_every (`int`, *optional*), tokenizer (*optional*):
            Also score the response so far after every k-th token, with the tokenizer that the responses were decoded
            by. A part has no reward where a function that scores the whole gives no finite number.

    Raises:
        `ValueError`: if there is nothing to score; if a function cannot be called with what the rollouts have, returns
        a wrong number of rewards, or one that is no finite number (names the function and the row); if no rollout gets
        a reward. `RuntimeError`: if a function itself fails.
    """
    check_choice("combine_rewards", combine_rewards, ScoringSettings.choices("combine_rewards"))
    check_prefixes(prefix_every, tokenizer)
    check_parts(rewards, prefix_every)
    if not rollouts or not rewards:
        raise ValueError(f"Nothing to score: {len(rollouts)} rollouts, {len(rewards)} reward functions.")
    if not all(map(callable, rewards)):
        raise ValueError(f"Each reward must be a function, one argument for each, got {rewards!r}.")
    scored, counts = scored_rollouts(rollouts, rewards, on_bad_rows, combine_rewards, source, prefix_every, tokenizer)
    names = [reward_name(function) for function in rewards]
    unscored = sum(rollout.reward is None for rollout in scored)
    left_out = what_is_left_out(list(zip(names, counts, strict=True)), unscored, len(scored), combine_rewards)
    if left_out:
        logger.warning(left_out)
    if prefix_every is not None and not any(rollout.prefix_tokens for rollout in scored):
        logger.warning(NO_PREFIX)
    return scored


def scored_rollouts(
    rollouts: Sequence[Rollout],
    rewards: Sequence[RewardFunction],
    on_bad_rows: str,
    combine_rewards: str,
    source: str,
    prefix_every: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[list[Rollout], list[int]]:
    """(rollouts with their rewards, how many of them each function scored); arguments as for [`score_rollouts`]."""
    scores, bad = called_rewards(rollouts, rewards, source)
    report_bad_rows(list(bad.values()), on_bad_rows)
    found = [
        replace(
            rollout,
            reward=None if row in bad else _reward_of(values, combine_rewards),
            prefix_tokens=None,
            prefix_rewards=None,
        )
        for row, (rollout, *values) in enumerate(zip(rollouts, *scores, strict=True))
    ]
    if prefix_every is not None:
        scored_by = [[value is not None for value in values] for values in zip(*scores, strict=True)]
        found = _with_prefixes(found, scored_by, rewards, combine_rewards, source, prefix_every, tokenizer)
    return found, [sum(value is not None for value in values) for values in scores]


def check_prefixes(prefix_every: int | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise `ValueError` for no number of tokens, or if the response so far cannot be had for want of a tokenizer."""
    if prefix_every is not None:
        check_int("prefix_every", prefix_every, low=1)
    if prefix_every is not None and tokenizer is None:
        raise ValueError("To score the response so far (`prefix_every`), give the `tokenizer` of the responses too.")


def check_parts(rewards: Iterable[RewardFunction], prefix_every: int | None) -> None:
    """Raise `ValueError` if the response so far is to be scored, and no reward looks at the response."""
    rewards = list(rewards)
    if prefix_every is not None and rewards and all(isinstance(function, ColumnReward) for function in rewards):
        raise ValueError(
            "A column holds one number for a row, whatever the response so far is: leave `prefix_every` out, or give "
            "a reward that scores texts too."
        )


def check_tells_answers_apart(rewards: Iterable[RewardFunction]) -> None:
    """Raise `ValueError` if answers to one prompt are to be held against each other, and a reward is a column."""
    for function in rewards:
        if isinstance(function, ColumnReward):
            raise ValueError(
                f"The column {function.column!r} holds one number for a prompt, whatever the answer, so it tells no "
                "answer from another: name a reward that scores answers instead."
            )


def _with_prefixes(
    rollouts: Sequence[Rollout],
    scored_by: Sequence[list[bool]],
    rewards: Sequence[RewardFunction],
    combine_rewards: str,
    source: str,
    every: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Rollout]:
    """
    Rollouts with the rewards of the response so far, where the whole one has a reward; of a part that not all of the
    functions score which score the whole there is none.
    """
    if 2 * sum(is_decoded_by(rollout, tokenizer) for rollout in rollouts) < len(rollouts):
        raise ValueError(
            f"The tokenizer does not make the texts of {source} of their tokens, so what they were after some of them "
            "is not known: give that of the base which drew them."
        )
    # Made a call at a time: all parts of long responses are many times what the responses are.
    together = (part for r in rollouts if r.reward is not None for part in responses_so_far(r, tokenizer, every))
    # A function that copes with a call for all responses copes with so many parts of them.
    at_once = max(len(rollouts), _PARTS_AT_ONCE)
    calls = iter(lambda: list(islice(together, at_once)), [])
    names = _columns_of(rollouts)
    scores = (values for call in calls for values in _called_so_far(call, rewards, source, names))
    result = []
    for rollout, functions in zip(rollouts, scored_by, strict=True):
        known = {}
        counts = () if rollout.reward is None else numbers_so_far(rollout, every)
        for count, values in zip(counts, scores, strict=False):
            if values is not None and [value is not None for value in values] == functions:
                known[count] = _reward_of(values, combine_rewards)
        result.append(replace(rollout, prefix_tokens=list(known), prefix_rewards=list(known.values())))
    return result


def _called_so_far(
    parts: Sequence[Rollout], rewards: Sequence[RewardFunction], source: str, names: Collection[str] | None = None
) -> list[tuple[float | None, ...] | None]:
    """What the functions say of each part of a response, `None` where one says what is no finite number."""
    try:
        scores, bad = called_rewards(parts, rewards, source, names)
        return [None if row in bad else values for row, values in enumerate(zip(*scores, strict=True))]
    except (RuntimeError, ValueError) as error:
        said = f"{error} (It was given the response so far, part of a text: leave `prefix_every` out if it needs all.)"
        raise type(error)(said) from error.__cause__ or error


def _columns_of(rollouts: Sequence[Rollout]) -> set[str]:
    return {name for rollout in rollouts for name in rollout.columns}


def called_rewards(
    rollouts: Sequence[Rollout],
    rewards: Sequence[RewardFunction],
    source: str,
    names: Collection[str] | None = None,
) -> tuple[list[list[float | None]], dict[int, BadRow]]:
    """
    (what each function says of each rollout, `None` where that is no finite number; the rollouts of which one says
    what is neither `None` nor a finite number). `names` are the columns, by default those of the rollouts.
    """
    names = _columns_of(rollouts) if names is None else names
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


def what_is_left_out(scored: Sequence[tuple[str, int]], unscored: int, total: int, combine_rewards: str) -> str | None:
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


def fingerprints_of(rewards: dict[str, RewardFunction]) -> tuple[list[str | None], str]:
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
