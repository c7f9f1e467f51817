"""Prompts: read from wherever they are and checked row by row, so that they can be sampled, scored and stored."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from itertools import islice
from pathlib import PurePath
from typing import Any

import numpy as np
from transformers.utils import logging

from ..settings import BadRowSettings, PromptSettings
from ..utils.checks import check_choice
from .tables import located_rows
from .text_files import BadRow, LeftOut, chat_of_text, is_text

logger = logging.get_logger(__name__)

# A prompt is a text, or a list of chat messages: {"role": ..., "content": ...} and what else a chat template knows.
Prompt = str | list[dict[str, Any]]

# How many bad rows a message names.
_NAMED = 5
# How deep values may be nested, and how many bits a number may have: what every reader of JSON takes.
_DEEPEST = 100
_MOST_BITS = 10_000


@dataclass
class Prompts:
    """
    Checked prompts.

    Args:
        rows (`list[dict[str, Any]]`):
            Rows with `prompt` and further columns of what JSON can hold, in the source's order.
        numbers (`list[int]`):
            Each row's number in the source, bad rows counted, so that leaving some out renumbers none.
        bad_rows (`list[BadRow]`):
            What was left out.
        fingerprint (`str`, *optional*):
            A hash of rows and numbers, whatever the format they were read from; by default it is computed.
        dataset (`str`, *optional*):
            The Hub data set that they are from.
        places (`list[str]`, *optional*):
            Where each row stands in its source, such as `"prompts.jsonl, line 7"`.
    """

    rows: list[dict[str, Any]]
    numbers: list[int]
    bad_rows: list[BadRow] = field(default_factory=list)
    fingerprint: str = ""
    dataset: str | None = None
    places: list[str] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self):
        self.fingerprint = self.fingerprint or _fingerprint(self.rows, self.numbers)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> set[str]:
        """Names of what the rows hold beside `prompt`."""
        return {name for row in self.rows for name in row} - {"prompt"}

    def place(self, index: int) -> str:
        """Where a row stands, for messages: its place in the source, or its number if that is not known."""
        return self.places[index] if self.places else f"prompt {self.numbers[index]} (the first is 0)"

    def take(self, indices: Iterable[int]) -> Prompts:
        """Some of the prompts, by their indices in `rows`; each keeps its number."""
        indices = list(indices)
        rows, numbers = ([each[i] for i in indices] for each in (self.rows, self.numbers))
        places = [self.places[i] for i in indices] if self.places else []
        return Prompts(rows, numbers, dataset=self.dataset, places=places)


def report_bad_rows(bad_rows: Sequence[BadRow], on_bad_rows: str, can_skip: bool = True) -> None:
    """
    Warn of bad rows that are left out, or raise.

    Args:
        bad_rows (sequence of [`BadRow`]):
            What cannot be used.
        on_bad_rows (`str`):
            `"error"` or `"skip"`.
        can_skip (`bool`, *optional*, defaults to `True`):
            Whether the caller can leave rows out, and some would be left.

    Raises:
        `ValueError`: if there are some and `on_bad_rows` is `"error"`; names the first.
    """
    check_choice("on_bad_rows", on_bad_rows, BadRowSettings.choices("on_bad_rows"))
    if not bad_rows:
        return
    named = "; ".join(f"{row.location}: {row.reason}" for row in bad_rows[:_NAMED])
    more = f"; and {len(bad_rows) - _NAMED} more" if len(bad_rows) > _NAMED else ""
    count = "1 row" if len(bad_rows) == 1 else f"{len(bad_rows)} rows"
    if on_bad_rows == "error":
        remedy = " To leave out such rows: `on_bad_rows='skip'` (`--on-bad-rows skip`)." if can_skip else ""
        raise ValueError(f"{count} cannot be used: {named}{more}.{remedy}")
    logger.warning(f"{count} left out: {named}{more}.")


class _CannotKeepError(ValueError):
    """A value has no place in JSON; says what it is."""


def _plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it: times as ISO texts, durations as seconds, what is not there (NaN, NaT) as `None`."""
    if depth > _DEEPEST:
        raise _CannotKeepError("it is nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _plain(value.value, depth + 1)
    if isinstance(value, str):
        if not is_text(value):
            raise _CannotKeepError("it holds text that is not UTF-8")
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            raise _CannotKeepError("it holds bytes that are no text") from None
    if isinstance(value, (int, float, Decimal)):
        return _plain_number(value)
    if isinstance(value, Mapping):
        return _plain_mapping(value, depth)
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        # In an order that is the same in every process.
        return sorted((_plain(item, depth + 1) for item in value), key=json.dumps)
    return _plain_object(value, depth)


def _plain_number(value: int | float | Decimal) -> int | float | None:
    if isinstance(value, Decimal) and value.is_finite() and value.as_tuple().exponent >= 0:
        value = int(value)
    if isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise _CannotKeepError(f"it holds a number of {value.bit_length()} bits")
        return int(value)
    value = float(value)
    if math.isinf(value):
        raise _CannotKeepError("it holds an infinite number")
    return None if math.isnan(value) else value


def _plain_mapping(value: Mapping, depth: int) -> dict[str, Any]:
    kept = {}
    for key, item in value.items():
        name = _plain(key, depth + 1)
        name = name if isinstance(name, str) else str(name)
        if name in kept:
            raise _CannotKeepError(f"it holds two keys {name!r}")
        kept[name] = _plain(item, depth + 1)
    return kept


def _plain_object(value: Any, depth: int) -> Any:
    """What is of another library."""
    if value is getattr(sys.modules.get("pandas"), "NA", None):
        return None
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, (datetime.date, datetime.time)):
        return None if value != value else value.isoformat()  # NaT is a time, and equals nothing
    if isinstance(value, (uuid.UUID, PurePath)):
        return str(value)
    if isinstance(value, (np.datetime64, np.timedelta64)):
        if np.isnat(value):
            return None
        is_time = isinstance(value, np.datetime64)
        return str(np.datetime_as_string(value)) if is_time else float(value / np.timedelta64(1, "s"))
    if isinstance(value, np.ndarray) and value.dtype.kind in "mM":
        return [_plain(item, depth + 1) for item in value] if value.ndim else _plain(value[()], depth + 1)
    if isinstance(value, np.longdouble):
        return _plain_number(float(value))
    for to_python in ("as_py", "tolist"):  # scalars of Arrow; arrays, tensors, series, and numpy's numbers
        if hasattr(value, to_python):
            return _plain(getattr(value, to_python)(), depth + 1)
    raise _CannotKeepError(f"it holds {type(value).__name__}")


def _kept(value: Any) -> Any:
    """A value as it is stored and handed on; `_CannotKeepError` if it cannot be."""
    try:
        return _plain(value)
    except _CannotKeepError:
        raise
    # Objects of any library are asked what they are.
    except Exception as error:
        raise _CannotKeepError(f"it holds {type(value).__name__} ({error})") from error


def _wrong_in_messages(messages: list) -> str | None:
    """What is wrong with a list of chat messages, if something is."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "the prompt is no list of messages with a role and a content"
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                    return f"a message's content holds a part of the type {kind!r}, only texts can be sampled from"
        elif content is None:
            if not any(value for key, value in message.items() if key not in ("role", "name")):
                return "the prompt is no list of messages with a role and a content"
        elif not isinstance(content, str):
            return (
                f"a message's content is {type(content).__name__}, expected a text: the prompt is no list of messages"
            )
    return None


def _answer_start(text: str) -> int | None:
    """Where the answer begins that a dialogue written as text ends with, as in HH-RLHF."""
    start = text.rfind("\n\nAssistant:")
    if start < 0 or start < text.rfind("\n\nHuman:") or "Human:" not in text[:start]:
        return None
    start += len("\n\nAssistant:")
    return start if text[start:].strip() else None


def _check_prompt(prompt: Any, is_conversation: bool, on_answers: str) -> tuple[Prompt | None, str]:
    """(the prompt, or `None`; what is wrong with it)."""
    try:
        prompt = _kept(prompt)
    except _CannotKeepError as error:
        return None, f"the prompt cannot be used: {error}"
    if isinstance(prompt, str):
        try:
            prompt = chat_of_text(prompt)
        except ValueError as error:
            return None, str(error)
    if not isinstance(prompt, (str, list)):
        return None, f"the prompt is {type(prompt).__name__}, expected a text or a list of chat messages"
    if isinstance(prompt, list):
        if wrong := _wrong_in_messages(prompt):
            return None, wrong
        while prompt and prompt[-1]["role"] == "assistant" and (is_conversation or on_answers == "cut"):
            prompt = prompt[:-1]
        if not any(value for message in prompt for key, value in message.items() if key != "role"):
            return None, "the prompt is empty"
        if prompt[-1]["role"] == "assistant":
            return None, (
                "the prompt ends with the assistant's turn, and only texts can be gone on with: leave that turn out, "
                "or let `on_answers='cut'` (`--on-answers cut`) ask for it anew"
            )
        return prompt, ""
    if not prompt.strip():
        return None, "the prompt is empty"
    start = None if on_answers == "keep" else _answer_start(prompt)
    if start is not None and on_answers == "error":
        return None, (
            f"the prompt ends with an answer ({prompt[start:].strip()[:40]!r}): `on_answers='cut'` (`--on-answers "
            "cut`) asks for it anew, `keep` lets the model go on with it"
        )
    return prompt[:start], ""


def _check_row(
    row: Any, location: str, settings: PromptSettings, left_out: LeftOut
) -> tuple[dict[str, Any] | None, str]:
    """(the row with its `prompt` and all columns that can be kept, or `None`; what is wrong with it)."""
    if not isinstance(row, Mapping):
        return None, "not an object with a prompt"
    columns: dict[str, Any] = {}
    for key, value in row.items():
        if str(key) in columns:
            left_out.add(str(key), "two columns have this name")
        columns[str(key)] = value
    source = settings.prompt_column
    # Only where no column was named.
    if source not in columns and source == "prompt":
        source = "messages"
    if source not in columns:
        return None, f"no column {settings.prompt_column!r}, it has {sorted(columns)}"
    prompt, wrong = _check_prompt(columns.pop(source), source != "prompt", settings.on_answers)
    if prompt is None:
        return None, wrong
    if isinstance(prompt, str) and source != settings.prompt_column:
        return None, (
            "the column 'messages' holds a text that is no list of chat messages: if these texts are the prompts, "
            "`prompt_column='messages'` (`--prompt-column messages`) takes them"
        )
    if "prompt" in columns:
        left_out.add("prompt", f"the prompts, which {source!r} holds, take its name")
    kept = {"prompt": prompt}
    for name, value in columns.items():
        if name not in left_out:
            try:
                kept[_kept(name)] = _kept(value)
            except _CannotKeepError as error:
                left_out.add(name, f"{error} ({location})")
    return kept, ""


def load_prompts(source: Any, settings: PromptSettings | None = None, **changes) -> Prompts:
    """
    Read prompts and check every row.

    Whatever JSON can hold is kept, and times as ISO texts, durations as seconds, bytes as the UTF-8 that they are, NaN
    as `None`. A column that cannot be kept, such as images, is left out with a warning.

    Args:
        source:
            A file (`.jsonl`, `.jsonl.gz`, `.json`, `.csv`, `.tsv`, `.parquet`), a folder or Hub name that
            [`~datasets.load_dataset`] takes, a data set, a table of pandas, Arrow or polars, a dict of columns, or a
            sequence of texts, lists of chat messages or rows. JSON files hold the same. Of [`Prompts`] the first ones
            are taken, if there is a `limit`.
        settings ([`PromptSettings`], *optional*), changes:
            How to read them; single settings as keywords.

    Raises:
        `OSError`: if there is no such file or data set. `ValueError`: if a row, or every row, cannot be used, or there
        is no such column; names the row. `TypeError`: if the source is nothing that holds rows in an order.
        `ImportError`: if an extra is missing.
    """
    settings = PromptSettings.of(settings, changes)
    if isinstance(source, Prompts):
        return source if settings.limit is None else source.take(range(len(source))[: settings.limit])
    column = settings.prompt_column
    rows, numbers, places, bad, left_out = [], [], [], [], LeftOut()
    kind, count, found = None, 0, set()
    for number, (location, row) in enumerate(islice(located_rows(source, settings, left_out), settings.limit)):
        count += 1
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        found |= set(map(str, row)) if isinstance(row, Mapping) else set()
        checked, reason = _check_row(row, location, settings, left_out)
        if checked is not None and kind is None:
            kind = type(checked["prompt"])
        if checked is not None and type(checked["prompt"]) is not kind:
            reason = "a text among chat messages" if kind is list else "chat messages among texts"
            checked = None
        if checked is None:
            bad.append(BadRow(location, reason))
        else:
            rows.append(checked)
            numbers.append(number)
            places.append(location)
    name = source if isinstance(source, (str, os.PathLike)) else "The source"
    if count == 0:
        raise ValueError(f"No prompts: {name} holds no rows.")
    if not rows and found and column not in found and not (column == "prompt" and "messages" in found):
        hint = ""
        if {"chosen", "rejected"} <= found:
            hint = " `--prompt-column chosen --on-answers cut` takes the prompts of such pairs."
        elif {"role", "content"} <= found:
            hint = " If these are the messages of one chat, give a list of chats: `[chat]`."
        how = "name the column (`prompt_column`, `--prompt-column`)."
        raise ValueError(f"{name} has no column {column!r}, it has {sorted(found)}: {how}{hint}")
    report_bad_rows(bad, settings.on_bad_rows if rows else "error", can_skip=bool(rows))
    for left, reason in left_out.items():
        logger.warning(f"The column {left!r} is left out: {reason}.")
    # A reward function gets the same columns for every row, however rows are shared out.
    missing = dict.fromkeys(key for row in rows for key in row if key == "prompt" or key not in left_out)
    rows = [{key: row.get(key) for key in missing} for row in rows]
    dataset = source if isinstance(source, str) and not os.path.exists(source) else None
    return Prompts(rows, numbers, bad, dataset=dataset, places=places)


def _fingerprint(rows: Iterable[dict[str, Any]], numbers: Iterable[int]) -> str:
    digest = hashlib.sha256()
    for row, number in zip(rows, numbers, strict=True):
        try:
            digest.update(json.dumps([number, row], sort_keys=True).encode())
        except (TypeError, ValueError) as error:
            raise ValueError(f"Row {number} cannot be stored ({error}): read rows with `load_prompts`.") from error
    return digest.hexdigest()
