"""Prompts: from files, data sets or memory, checked row by row, and encoded with the chat template once."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..settings import BadRowSettings, PromptSettings
from ..utils.checks import check_choice
from ..utils.extras import needs_extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

# A prompt is a text or a list of chat messages {"role": ..., "content": ...}.
Prompt = str | list[dict[str, str]]

# How many bad rows a message names.
_NAMED = 5


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it is (`"prompts.jsonl, line 7"`) and why."""

    location: str
    reason: str


@dataclass
class Prompts:
    """
    Checked prompts.

    Args:
        rows (`list[dict[str, Any]]`):
            Rows with `prompt` and further columns, in the source's order.
        numbers (`list[int]`):
            Each row's number in the source, bad rows counted, so that leaving some out renumbers none.
        bad_rows (`list[BadRow]`):
            What was left out.
        fingerprint (`str`):
            A hash of rows and numbers, whatever the format they were read from.
        dataset (`str`, *optional*):
            The Hub data set that they are from.
    """

    rows: list[dict[str, Any]]
    numbers: list[int]
    bad_rows: list[BadRow] = field(default_factory=list)
    fingerprint: str = ""
    dataset: str | None = None

    def __len__(self) -> int:
        return len(self.rows)


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


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            location = f"{path}, line {number}"
            try:
                yield location, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                yield location, BadRow(location, "not UTF-8 text")
            except (ValueError, RecursionError) as error:
                yield location, BadRow(location, f"not JSON ({error})")


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Bytes that are no UTF-8 become lone surrogates, which the check of each row finds.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            row.pop(None, None)
            yield f"{path}, line {reader.line_num}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with needs_extra("train", "Reading Parquet files"):
        from pyarrow.parquet import ParquetFile
    try:
        file = ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a complete Parquet file ({error}).") from error
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            yield f"{path}, row {number}", row
            number += 1


def _json_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error
    except ValueError:
        yield from _json_lines(path)  # JSONL under another name
        return
    for number, row in enumerate(values if isinstance(values, list) else [values]):
        yield f"{path}, row {number}", row


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _dataset_rows(source: Any, settings: PromptSettings) -> Iterator[tuple[str, Any]]:
    name = str(source) if isinstance(source, (str, os.PathLike)) else "the data set"
    if isinstance(source, (str, os.PathLike)):
        with needs_extra("train", "Loading data sets"):
            import datasets
        folder = Path(source)
        try:
            if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
                source = datasets.load_from_disk(name)
            else:
                source = datasets.load_dataset(
                    name, settings.config_name, split=settings.split, streaming=settings.streaming
                )
        except (OSError, ValueError, ConnectionError) as error:
            raise OSError(
                f"{name} is neither a file of prompts ({', '.join(_READERS)}) nor a data set that could be loaded: "
                f"{error}"
            ) from error
    if hasattr(source, "keys") and hasattr(source, "column_names"):
        if settings.split not in source:
            raise ValueError(f"{name} has no split {settings.split!r}, it has {sorted(source)}.")
        source = source[settings.split]
    for number, row in enumerate(source):
        yield f"{name}, row {number}", row


def _located_rows(source: Any, settings: PromptSettings) -> Iterator[tuple[str, Any]]:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        if path.is_file():
            if suffix not in _READERS or (path.suffix == ".gz" and _READERS[suffix] is not _json_lines):
                raise ValueError(f"{path}: expected a file that ends in {', '.join(_READERS)} or .jsonl.gz.")
            return _READERS[suffix](path)
        if suffix in _READERS:
            raise OSError(f"{path} is no file: name a file of prompts.")
        return _dataset_rows(source, settings)
    if hasattr(source, "column_names"):
        return _dataset_rows(source, settings)
    rows = ((f"row {i}", row if isinstance(row, dict) else {"prompt": row}) for i, row in enumerate(source))
    return rows


def _clean_messages(messages: list) -> list[dict[str, Any]] | None:
    if not all(isinstance(message, dict) for message in messages):
        return None
    # Arrow fills keys that other messages have with None.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    complete = all(isinstance(m.get(key), str) for m in messages for key in ("role", "content"))
    return messages if complete else None


def _check_row(row: Any, column: str) -> tuple[dict[str, Any] | None, str]:
    """(the row with its `prompt`, or `None`; what is wrong with it)."""
    if not isinstance(row, dict):
        return None, "not an object with a prompt"
    row = dict(row)
    if column not in row and "messages" in row:
        prompt = row.pop("messages")
        while isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
            if prompt[-1].get("role") != "assistant":
                break
            prompt = prompt[:-1]
    elif column not in row:
        return None, f"no column {column!r}, it has {sorted(map(str, row))}"
    else:
        prompt = row.pop(column)
    if isinstance(prompt, list):
        prompt = _clean_messages(prompt)
        if prompt is None:
            return None, "the prompt is no list of messages with a role and a content"
    if not isinstance(prompt, (str, list)):
        return None, f"the prompt is {type(prompt).__name__}, expected a text or a list of chat messages"
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        return None, "the prompt is empty"
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        return None, "the prompt ends with the assistant's turn"
    row = {"prompt": prompt, **row}
    try:
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return None, "not UTF-8 text"
    except (TypeError, ValueError) as error:
        return None, f"a column cannot be kept as JSON ({error})"
    return row, ""


def load_prompts(source: Any, settings: PromptSettings | None = None, **changes) -> Prompts:
    """
    Read prompts and check every row.

    Args:
        source:
            A file (`.jsonl`, `.jsonl.gz`, `.json`, `.csv`, `.parquet`), a folder or Hub name that
            [`~datasets.load_dataset`] takes, a data set, or a sequence of texts, lists of chat messages or rows.
        settings ([`PromptSettings`], *optional*), changes:
            How to read them; single settings as keywords.

    Raises:
        `OSError`: if there is no such file or data set. `ValueError`: if a row, or every row, cannot be used, or there
        is no such column; names the row. `ImportError`: if an extra is missing.
    """
    settings = PromptSettings.of(settings, changes)
    column, on_bad_rows = settings.prompt_column, settings.on_bad_rows
    rows, numbers, bad = [], [], []
    kind, count, found = None, 0, set()
    for number, (location, row) in enumerate(islice(_located_rows(source, settings), settings.limit)):
        count += 1
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        found |= row.keys() if isinstance(row, dict) else set()
        checked, reason = _check_row(row, column)
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
    name = source if isinstance(source, (str, os.PathLike)) else "The source"
    if count == 0:
        raise ValueError(f"No prompts: {name} holds no rows.")
    if not rows and found and not {column, "messages"} & found:
        raise ValueError(f"{name} has no column {column!r}, it has {sorted(map(str, found))}: name the column.")
    report_bad_rows(bad, on_bad_rows if rows else "error", can_skip=bool(rows))
    # A reward function gets the same columns for every row, however rows are shared out.
    missing = dict.fromkeys(key for row in rows for key in row)
    rows = [missing | row for row in rows]
    dataset = source if isinstance(source, str) and not os.path.exists(source) else None
    return Prompts(rows, numbers, bad, _fingerprint(rows, numbers), dataset)


def _fingerprint(rows: Iterable[dict[str, Any]], numbers: Iterable[int]) -> str:
    digest = hashlib.sha256()
    for row, number in zip(rows, numbers, strict=True):
        digest.update(json.dumps([number, row], sort_keys=True).encode())
    return digest.hexdigest()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """
    Token ids of a prompt. Chat messages, and texts if the tokenizer has a chat template, go through the template (a
    text as the user's message); other texts are tokenized as they are. A text that holds a special token of the
    tokenizer is in the model's format already: it is taken as it is, without the template and without further special
    tokens.

    Raises:
        `ValueError`: for chat messages and a tokenizer without a chat template, or a prompt without tokens.
    """
    if isinstance(prompt, str):
        plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        if special.intersection(plain):
            return list(plain)
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        ids = tokenizer(prompt)["input_ids"]
    else:
        if tokenizer.chat_template is None:
            raise ValueError("The prompt is a list of chat messages, but the tokenizer has no chat template.")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise ValueError(f"The prompt {prompt!r} has no tokens.")
    return list(ids)
