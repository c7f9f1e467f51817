"""Whether prompts are unseen: held against what the heads at hand were trained, validated and tuned on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.fingerprints import prompt_hashes
from ..data.prompts import Prompts, load_prompts
from ..heads.seen_prompts import SeenPrompts
from ..heads.value_head import ValueHead
from ..modeling.causal_lm import ReControlForCausalLM
from ..settings import AnswerSettings

logger = logging.get_logger(__name__)

TRAINED_ON = ("trained_on",)
SEEN = tuple(SeenPrompts.kinds())
# Rows that an endless source may give before it is taken to give nothing else.
_MOST_READ = 1_000_000


def heads_of(model: PreTrainedModel) -> list[nn.Module]:
    """The heads of a model, if it has any."""
    return list(model.value_heads.values()) if isinstance(model, ReControlForCausalLM) else []


def has_no_record(heads: Iterable[nn.Module]) -> bool:
    """Whether some head does not say which prompts it was trained on."""
    records = [head.seen_prompts if isinstance(head, ValueHead) else None for head in heads]
    return any(record is None or not len(record.trained_on) for record in records)


def seen_among(prompts: Prompts, heads: Iterable[nn.Module], kinds: Sequence[str] = SEEN) -> dict[int, str]:
    """
    Of each prompt that some head has seen its place among `prompts`, and how it was seen. A text and the chat of its
    one user turn are the same prompt.

    Args:
        heads (iterable of `nn.Module`):
            Those that say nothing of their prompts are taken to have seen none.
        kinds (sequence of `str`, *optional*):
            What counts as seen: some of `"trained_on"`, `"validated_on"` and `"tuned_on"`.
    """
    seen: dict[int, str] = {}
    for head in heads:
        record = head.seen_prompts if isinstance(head, ValueHead) else None
        for kind in kinds if record is not None else ():
            for number in getattr(record, kind).tolist():
                seen.setdefault(number, kind.replace("_", " "))
    return {place: seen[number] for place, number in enumerate(prompt_hashes(prompts)) if number in seen}


def load_unseen(
    source: Any, settings: AnswerSettings, heads: Sequence[nn.Module], purpose: str, kinds: Sequence[str] = SEEN
) -> Prompts:
    """
    [`load_prompts`], where prompts that some head has seen and that are to be skipped do not count towards the
    `limit`: rows are read until so many are left, or there are no more (of an endless source: a million).

    Args:
        settings ([`AnswerSettings`]):
            How to read them. Unless `on_seen_prompts` is `"skip"`, seen ones are for [`unseen`] to judge.
        heads, purpose, kinds:
            As for [`unseen`].

    Raises:
        As [`load_prompts`] and [`unseen`].
    """
    count, is_read_once = settings.limit, isinstance(source, Iterator)
    rows: Any = [] if is_read_once else source
    while True:
        if is_read_once:
            rows += islice(source, None if count is None else count - len(rows))
        prompts = load_prompts(rows, replace(settings, limit=count))
        seen = seen_among(prompts, heads, kinds) if settings.on_seen_prompts == "skip" else {}
        if not seen:
            return prompts
        total, left = len(prompts) + len(prompts.bad_rows), len(prompts) - len(seen)
        if count is None or total < count or left >= (settings.limit or 0) or count >= _MOST_READ:
            return load_prompts(unseen(prompts, heads, purpose, "skip", kinds), limit=settings.limit)
        count *= 8


def unseen(
    prompts: Prompts, heads: Iterable[nn.Module], purpose: str, on_seen_prompts: str, kinds: Sequence[str] = SEEN
) -> Prompts:
    """
    The prompts that no head has seen, see [`seen_among`].

    Args:
        purpose (`str`):
            What the prompts are for, in messages.
        on_seen_prompts (`str`):
            What to do about others: `"error"`, `"skip"` or `"allow"`.

    Raises:
        `ValueError`: if there are others and they are an error, or no prompt is left; names how many, and the first.
    """
    counted = " or ".join(kind.replace("_", " ") for kind in kinds)
    return _without(prompts, seen_among(prompts, heads, kinds), f"the head was {counted}", purpose, on_seen_prompts)


def unlearnt(prompts: Prompts, learnt: Collection[int], what: str, on_seen_prompts: str) -> Prompts:
    """
    The prompts that something else was not made of.

    Args:
        learnt (collection of `int`):
            The [`prompt_hash`] of each prompt that it was made of.
        what (`str`):
            What it is, in messages.
        on_seen_prompts (`str`):
            As for [`unseen`], which says what is raised.
    """
    found = {place: "trained on" for place, number in enumerate(prompt_hashes(prompts)) if number in learnt}
    return _without(prompts, found, f"{what} was made of", "to compare on", on_seen_prompts)


def _without(prompts: Prompts, found: dict[int, str], whose: str, purpose: str, on_seen_prompts: str) -> Prompts:
    if not found:
        return prompts
    first, how = next(iter(found.items()))
    said = str(prompts.rows[first]["prompt"])[:60]
    which = (
        f"{len(found)} of {len(prompts)} prompts {purpose} are among those that {whose}; the first is "
        f"{prompts.place(first)} ({how}): {said!r}"
    )
    if on_seen_prompts == "allow":
        logger.warning(f"{which}. On such prompts a control looks better than it is.")
        return prompts
    if on_seen_prompts == "error":
        raise ValueError(
            f"{which}. On such prompts a control looks better than it is. Give others; `on_seen_prompts='skip'` "
            "(`--on-seen-prompts skip`) leaves them out, `allow` takes them all the same."
        )
    if len(found) == len(prompts):
        raise ValueError(f"{which}: none is left.")
    logger.warning(f"{which}: these are left out.")
    return prompts.take([place for place in range(len(prompts)) if place not in found])
