"""Rows of prompts from files of text: JSON, JSON lines, CSV. Each comes with its location."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..settings import PromptSettings

logger = logging.get_logger(__name__)

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_UTF8 = "not UTF-8 text: save the file in UTF-8"
# What Python takes for a number, but for leading zeros, which are those of codes.
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"([-+]?nan)?", re.IGNORECASE)
# A text that is a list of objects with a role, as JSON or as Python prints it.
_CHAT_AS_TEXT = re.compile(
    r"""\s*(array\()?\[\s*\{.*['"]role['"]\s*:.*\}\s*\]\s*(,\s*dtype=object\)\s*)?""", re.DOTALL
)

# The location of each row, and the row, or a `BadRow`.
LocatedRows = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it is (`"prompts.jsonl, line 7"`) and why."""

    location: str
    reason: str


class LeftOut(dict):
    """Columns that are left out, and of each the first reason."""

    def add(self, column: str, reason: str) -> None:
        """Leave a column out, in all rows."""
        self.setdefault(column, reason)


def is_text(value: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_names(names: list[str], settings: PromptSettings, left_out: LeftOut, source: str) -> None:
    """Leave out columns of one name."""
    for name in {name for name in names if names.count(name) > 1}:
        if name in (settings.prompt_column, "messages"):
            raise ValueError(f"{source} has {names.count(name)} columns {name!r}: give each its own name.")
        left_out.add(name, f"{names.count(name)} columns have this name")


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A text file in UTF-8, or what its first bytes say. Other bytes become lone surrogates, which checks find."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            start = file.read(4)
            file.seek(0)
            if start[0::2] == b"\0\0" or start[1::2] == b"\0\0":
                raise ValueError(f"{path} is UTF-16 or UTF-32 without a byte order mark: save the file in UTF-8.")
            encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
            yield io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=newline)
        except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged ({error}).") from error


def json_lines(path: Path, settings: PromptSettings, left_out: LeftOut) -> LocatedRows:
    """Rows of a file with one JSON value in each line: an object, a text or a list of chat messages."""
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            location = f"{path}, line {number}"
            if not is_text(line):
                yield location, BadRow(location, _NO_UTF8)
                continue
            try:
                yield location, _row(json.loads(line))
            except (ValueError, RecursionError) as error:
                yield location, BadRow(location, f"not JSON ({error})")


def json_file(path: Path, settings: PromptSettings, left_out: LeftOut) -> LocatedRows:
    """Rows of a JSON file: a list of objects, texts or chats, a single one, or one in each line."""
    with _text(path) as file:
        text = file.read()
    if not is_text(text):
        raise ValueError(f"{path} is {_NO_UTF8}.")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        yield from json_lines(path, settings, left_out)  # JSONL under another name
        return
    for number, row in enumerate(values if isinstance(values, list) else [values]):
        yield f"{path}, row {number}", _row(row)


def _row(value: Any) -> Any:
    """A row of what JSON holds: a row already, or a prompt."""
    return {"prompt": value} if isinstance(value, (str, list)) else value


def csv_rows(path: Path, settings: PromptSettings, left_out: LeftOut) -> LocatedRows:
    """Rows of a CSV file; a column that holds nothing but numbers holds numbers."""
    # The csv module's own limit is 131,072 characters.
    longest = csv.field_size_limit(2**31 - 1)
    try:
        separator, names = _csv_header(path, settings)
        check_names(names, settings, left_out, str(path))
        rows = _csv_table(path, separator, names, settings.limit)
    finally:
        csv.field_size_limit(longest)
    good = [(location, row) for location, row in rows if isinstance(row, dict)]
    for name in sorted({name for _, row in good for name in row} - {settings.prompt_column, "messages"}):
        _read_numbers(good, name, has_decimal_commas=separator == ";")
    yield from rows


def _csv_table(path: Path, separator: str, names: list[str], limit: int | None) -> list[tuple[str, Any]]:
    """Rows with their locations. Blanks before quotation marks are left out if the file is whole without them."""

    def read(skipinitialspace: bool) -> tuple[list[tuple[str, Any]], _DamagedError | None]:
        with _text(path, newline="") as file:
            try:
                return list(islice(_csv_lines(path, file, separator, names, skipinitialspace), limit)), None
            except _DamagedError as error:
                return [], error

    rows, damage = read(skipinitialspace=False)
    is_damaged = damage is not None or any(isinstance(row, BadRow) for _, row in rows)
    fields = (value or "" for _, row in rows if isinstance(row, dict) for value in row.values())
    if not is_damaged and not any(field.startswith(" ") and field.lstrip(" ").startswith('"') for field in fields):
        return rows
    found, still_damaged = read(skipinitialspace=True)
    is_whole = still_damaged is None and all(isinstance(row, dict) for _, row in found)
    if is_whole and (is_damaged or _without_blanks(found) != _without_blanks(rows)):
        return found
    if damage is not None:
        raise damage
    return rows


class _DamagedError(ValueError):
    """Nobody knows where a file's rows begin."""


def _without_blanks(rows: list[tuple[str, Any]]) -> list[list[str]]:
    return [[(value or "").lstrip(" ") for value in row.values()] for _, row in rows]


def _read_numbers(rows: list[tuple[str, dict[str, Any]]], name: str, has_decimal_commas: bool) -> None:
    """Make numbers of a column's texts, if all are; warn of a column in which only some are."""
    texts = [(row[name] or "").strip() for _, row in rows]
    has_decimal_commas = has_decimal_commas and any("," in text for text in texts)
    values = [_number(text, has_decimal_commas) for text in texts]
    odd = [i for i, text in enumerate(texts) if values[i] is None and not _NO_NUMBER.fullmatch(text)]
    if all(value is None for value in values):
        return
    if odd:
        logger.warning(
            f"The column {name!r} holds numbers, but also other texts: it is read as texts. The first is "
            f"{texts[odd[0]][:40]!r} ({rows[odd[0]][0]})."
        )
        return
    for (_, row), value in zip(rows, values, strict=True):
        row[name] = value


def _number(text: str, has_decimal_commas: bool) -> int | float | None:
    """The finite number that a text says, else `None`. With decimal commas a point would be one of thousands."""
    if has_decimal_commas:
        text = "" if "." in text else text.replace(",", ".", 1)
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    is_whole = not any(sign in text for sign in ".eE")
    try:
        value = int(text) if is_whole else float(text)
    except ValueError:  # more digits than Python reads
        return None
    return value if is_whole or math.isfinite(value) else None


def _csv_header(path: Path, settings: PromptSettings) -> tuple[str, list[str]]:
    """The separator under which the prompts have a column, and the columns' names."""
    headers = {}
    for separator in "\t" if path.suffix == ".tsv" else ",;\t":
        with _text(path, newline="") as file:
            names = next(
                (names for names in csv.reader(file, delimiter=separator, skipinitialspace=True) if names), []
            )
        headers[separator] = names = [name.strip() for name in names]
        if settings.prompt_column in names or "messages" in names:
            return separator, names
    return max(headers.items(), key=lambda item: len(item[1]))


def _csv_lines(
    path: Path, file: io.TextIOWrapper, separator: str, names: list[str], skipinitialspace: bool = False
) -> LocatedRows:
    reader = csv.reader(file, delimiter=separator, strict=True, skipinitialspace=skipinitialspace)
    has_names = False
    while True:
        location = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # Also where bad rows are skipped: what follows would be pieces of rows, or nothing.
            raise _DamagedError(
                f"{location}: a quotation mark has no partner ({error}), so nobody knows where later rows begin. Mend "
                "the file: a quotation mark inside a quoted text is written twice."
            ) from None
        location = f"{path}, line {reader.line_num}"
        if not fields:
            continue
        if not has_names:
            has_names = True
            continue
        if not all(map(is_text, fields)):
            yield location, BadRow(location, _NO_UTF8)
        elif len(fields) > len(names):
            reason = (
                f"{len(fields)} fields under {len(names)} names: a text that holds {separator!r} needs quotation marks"
            )
            yield location, BadRow(location, reason)
        else:
            yield location, dict(zip(names, fields + [None] * (len(names) - len(fields)), strict=True))


def chat_of_text(text: str) -> str | list:
    """
    The chat that a text holds as JSON, as in the columns of a CSV file; other texts as they are.

    Raises:
        `ValueError`: if it holds one that is not JSON.
    """
    if not _CHAT_AS_TEXT.fullmatch(text):
        return text
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(
            "the prompt is a list of chat messages as Python prints it, or as damaged JSON: write it with `json.dumps`"
        ) from None
    return values if all(isinstance(value, dict) and "role" in value for value in values) else text
