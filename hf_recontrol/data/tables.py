"""Rows of prompts from wherever they are: files, data sets, tables in memory."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import islice
from pathlib import Path
from typing import Any

from ..heads.hub import is_repo_id
from ..settings import PromptSettings
from ..utils.extras import needs_extra
from .text_files import BadRow, LeftOut, LocatedRows, check_names, csv_rows, json_file, json_lines

# What a folder holds that a data set was saved to, one of a single split or of several.
_SAVED, _SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
# Settings that say which rows of a data set are read, and how.
_OF_DATA_SETS = ("split", "config_name", "streaming")
# Characters of a text that an error repeats.
_SHOWN = 200
# Columns of chats, in which a null of Arrow is a key that only other rows have.
CHAT_COLUMNS = ("messages", "tools", "chat_template_kwargs")

_TAKEN = (
    "a file, a folder or Hub name, a data set, a pandas, Arrow or polars table, a dict of columns (lists of one "
    "length), or a list of texts, of lists of chat messages, or of rows"
)


def located_rows(source: Any, settings: PromptSettings, left_out: LeftOut) -> LocatedRows:
    """
    The rows of whatever [`load_prompts`] takes.

    Args:
        left_out ([`LeftOut`]):
            Gets the columns that cannot be read.

    Raises:
        `TypeError`: for what holds no rows in an order. `OSError`, `ValueError`: names the file; if a setting has no
        effect on it.
    """
    if isinstance(source, (str, os.PathLike)):
        _check_name(source)
    if unused := without_effect(source, settings):
        name = source if isinstance(source, (str, os.PathLike)) else f"prompts in a {type(source).__name__}"
        raise ValueError(
            f"`{unused[0]}={getattr(settings, unused[0])!r}` says how a data set is loaded by its name, and has no "
            f"effect on {name}: leave it out, and give the rows that are wanted."
        )
    if isinstance(source, (str, os.PathLike)):
        return _named_rows(source, settings, left_out)
    if hasattr(source, "column_names") and hasattr(source, "with_format"):
        return _dataset_rows(source, "the data set", settings, left_out)
    if hasattr(source, "itertuples"):
        return _frame_rows(source, settings, left_out)
    # Series and arrays hold prompts, not rows.
    if hasattr(source, "__arrow_c_stream__") and (hasattr(source, "columns") or hasattr(source, "schema")):
        with needs_extra("train", "Reading tables"):
            import pyarrow
        return _arrow_rows(pyarrow.table(source).to_batches(), "", settings, left_out)
    if isinstance(source, Mapping):
        return _column_rows(source)
    if not _is_sequence(source):
        raise TypeError(f"Prompts must be {_TAKEN}; got {type(source).__name__}{_remedy(source)}.")
    return ((f"row {i}", _row(row, f"row {i}")) for i, row in enumerate(source))


def without_effect(source: Any, settings: PromptSettings) -> list[str]:
    """Those of the settings that are not their defaults, and that say nothing of this source."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        used = _OF_DATA_SETS
        if path.is_file() or (path / _SAVED).is_file():
            used = ()
        elif (path / _SAVED_SPLITS).is_file():
            used = ("split",)
    else:
        is_data_set = hasattr(source, "column_names") and hasattr(source, "with_format")
        # One of a single split may know which it is.
        has_split = hasattr(source, "keys") or str(getattr(source, "split", None)) == settings.split
        used = ("split",) if is_data_set and has_split else ()
    default = PromptSettings()
    return [name for name in _OF_DATA_SETS if name not in used and getattr(settings, name) != getattr(default, name)]


def _suffix_of(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _check_name(source: str | os.PathLike) -> None:
    """Raise `OSError` for a text that names neither a file or folder nor anything on the Hub, such as a prompt."""
    name = os.fspath(source)
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    # Not of `Path`: those fail where a text is longer than a name can be.
    if not os.path.isfile(name) and _suffix_of(Path(name)) in _READERS:
        raise OSError(f"{name} is no file: name a file of prompts.")
    if not os.path.exists(name) and not is_repo_id(name):
        raise OSError(
            f"{shown!r} is neither a file of prompts ({', '.join(_READERS)}) nor a data set that could be loaded: "
            "there is no such folder, and the Hub has no such names. A prompt itself stands in a list: `[prompt]`."
        )


def _row(value: Any, location: str) -> Any:
    """A row of what a sequence holds: a row already, or a prompt."""
    if isinstance(value, tuple) and not all(isinstance(item, Mapping) for item in value):
        reason = (
            f"it is a tuple ({type(value).__name__}), whose columns have no names: give rows as dicts, or texts, or a "
            "DataFrame itself"
        )
        return BadRow(location, reason)
    return value if isinstance(value, Mapping) else {"prompt": value}


def _is_sequence(source: Any) -> bool:
    is_file = hasattr(source, "read")
    return (
        isinstance(source, Iterable)
        and not isinstance(source, (Set, bytes, bytearray, memoryview))
        and not is_file
        and getattr(source, "ndim", 1) == 1
    )


def _remedy(source: Any) -> str:
    if isinstance(source, Set):
        return ", which has no order: sort it into a list"
    return ", an open file: name it instead" if hasattr(source, "read") else ""


def _column_rows(columns: Mapping) -> LocatedRows:
    """Rows of a dict of columns."""
    lists = {
        name: isinstance(values, (list, tuple)) or (hasattr(values, "__len__") and hasattr(values, "__array__"))
        for name, values in columns.items()
    }
    if not columns or not all(lists.values()):
        other = next((name for name, is_list in lists.items() if not is_list), None)
        said = "it is empty" if other is None else f"{other!r} is {type(columns[other]).__name__}"
        raise TypeError(f"A dict must hold columns, lists of one length; {said}. To give a single row: `[row]`.")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The columns of a dict must be of one length, got {lengths}.")
    indexes = {name: values.index for name, values in columns.items() if hasattr(values, "iloc")}
    first = next(iter(indexes), None)
    for name, index in indexes.items():
        if not index.equals(indexes[first]):
            raise ValueError(
                f"The Series {first!r} and {name!r} have different indexes: pair them with "
                "`pandas.DataFrame(columns)`, or give lists."
            )
    for number, values in enumerate(zip(*columns.values(), strict=True)):
        yield f"row {number}", dict(zip(columns, values, strict=True))


def _frame_rows(frame: Any, settings: PromptSettings, left_out: LeftOut) -> LocatedRows:
    """Rows of a pandas DataFrame."""
    names = [str(name) for name in frame.columns]
    check_names(names, settings, left_out, "The DataFrame")
    if settings.prompt_column not in names and settings.prompt_column in frame.index.names:
        raise ValueError(
            f"{settings.prompt_column!r} is the DataFrame's index: `frame.reset_index()` makes a column of it."
        )
    for number, values in enumerate(frame.itertuples(index=False, name=None)):
        yield f"row {number}", _of_arrow(dict(zip(names, values, strict=True)), settings)


def _of_arrow(row: dict[str, Any], settings: PromptSettings, keep: Iterable[str] = ()) -> dict[str, Any]:
    for name in {settings.prompt_column, *CHAT_COLUMNS} - set(keep):
        if name in row:
            row[name] = without_nulls(row[name])
    return row


def without_nulls(value: Any) -> Any:
    """A nested value without the keys that hold nothing: Arrow gives every object the keys of all others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if hasattr(value, "__array__") and getattr(value, "dtype", None) == "O":
        value = value.tolist()
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _arrow_rows(batches: Iterable[Any], source: str, settings: PromptSettings, left_out: LeftOut) -> LocatedRows:
    """Rows of Arrow's record batches, which are from the file `source`, if it has a name."""
    number, name_of_source, before = 0, source or "The table", f"{source}, row" if source else "row"
    for batch in batches:
        names = batch.schema.names
        check_names(names, settings, left_out, name_of_source)
        columns = {}
        for name, column in zip(names, batch.columns, strict=True):
            if name in left_out:
                continue
            try:
                columns[name] = _arrow_values(column)
            # Values outside of Python's range, keys of one name, time zones that are not known here: many kinds.
            except Exception as error:
                if name in (settings.prompt_column, "messages"):
                    raise ValueError(f"{name_of_source}: the column {name!r} cannot be read ({error}).") from error
                left_out.add(name, f"it cannot be read ({error})")
        decoded = [name for name in columns if "arrow.json" in str(batch.schema.field(name).type)]
        for i in range(batch.num_rows):
            row = {name: values[i] for name, values in columns.items()}
            yield f"{before} {number}", _of_arrow(row, settings, decoded)
            number += 1


def _arrow_values(column: Any) -> list[Any]:
    values, kind = column.to_pylist(), column.type
    return [_decoded(value, kind) for value in values] if "arrow.json" in str(kind) else values


def _decoded(value: Any, kind: Any) -> Any:
    """A value of an Arrow type whose texts of the kind arrow.json stand for what they say."""
    if value is None or "arrow.json" not in str(kind):
        return value
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    if isinstance(value, dict):
        return {field.name: _decoded(value[field.name], field.type) for field in kind if value[field.name] is not None}
    return [_decoded(item, kind.value_type) for item in value]


def _parquet_rows(path: Path, settings: PromptSettings, left_out: LeftOut) -> LocatedRows:
    with needs_extra("train", "Reading Parquet files"):
        import pyarrow
        from pyarrow.parquet import ParquetFile
    try:
        yield from _arrow_rows(ParquetFile(path).iter_batches(), str(path), settings, left_out)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a complete Parquet file ({error}).") from error


_READERS = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": _parquet_rows,
}


def _named_rows(source: str | os.PathLike, settings: PromptSettings, left_out: LeftOut) -> LocatedRows:
    path = Path(source)
    suffix = _suffix_of(path)
    if path.is_file():
        if suffix not in _READERS or (path.suffix == ".gz" and _READERS[suffix] is not json_lines):
            raise ValueError(f"{path}: expected a file that ends in {', '.join(_READERS)} or .jsonl.gz.")
        return _READERS[suffix](path, settings, left_out)
    return _dataset_rows(_load_dataset(path, os.fspath(source), settings), os.fspath(source), settings, left_out)


def _load_dataset(path: Path, name: str, settings: PromptSettings) -> Any:
    with needs_extra("train", "Loading data sets"):
        import datasets
    try:
        if (path / _SAVED).is_file() or (path / _SAVED_SPLITS).is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, settings.config_name, split=settings.split, streaming=settings.streaming)
    # The library has errors of its own, and lets through those of many others.
    except Exception as error:
        raise OSError(
            f"{name} is neither a file of prompts ({', '.join(_READERS)}) nor a data set that could be loaded (a "
            f"prompt itself stands in a list, `[prompt]`): {error}"
        ) from error


def _dataset_rows(source: Any, name: str, settings: PromptSettings, left_out: LeftOut) -> LocatedRows:
    if hasattr(source, "keys"):
        if settings.split not in source:
            raise ValueError(f"{name} has no split {settings.split!r}, it has {sorted(source)}.")
        source = source[settings.split]
    # Of formats, a transform of the user's own alone says what the rows hold, and features do not describe its rows.
    is_custom = (getattr(source, "format", None) or {}).get("type") == "custom"
    source = source if is_custom else source.with_format(None)
    features = {} if is_custom else source.features or {}
    media = {
        column: type(kind).__name__ for column, feature in features.items() for kind in islice(_media(feature), 1)
    }
    for column, kind in media.items():
        if column == settings.prompt_column:
            raise ValueError(f"{name}: the column {column!r} holds {kind}, expected texts or chat messages.")
        left_out.add(column, f"it holds {kind}")
    decoded = [column for column, feature in features.items() if "Json" in str(feature)]
    rows = iter(_without_media(source, list(media)))
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        # A damaged file behind a stream, a generator that fails: errors of many kinds.
        except Exception as error:
            raise ValueError(f"{name}, row {number}: it cannot be read ({type(error).__name__}: {error}).") from error
        yield f"{name}, row {number}", _of_arrow(row, settings, decoded)
        number += 1


def _media(feature: Any) -> Iterator[Any]:
    """What of a feature is images, sounds or the like, which reading would decode."""
    if isinstance(feature, Mapping):
        for inner in feature.values():
            yield from _media(inner)
    elif isinstance(feature, (list, tuple)) or hasattr(feature, "feature"):
        for inner in feature if isinstance(feature, (list, tuple)) else [feature.feature]:
            yield from _media(inner)
    elif hasattr(feature, "decode") and type(feature).__name__ != "Json":
        yield feature


def _without_media(source: Any, columns: list[str]) -> Any:
    if not columns:
        return source
    if not hasattr(source, "num_rows"):
        # A stream decodes a row before it removes a column of it.
        for column in columns:
            feature = copy.deepcopy(source.features[column])
            for kind in _media(feature):
                kind.decode = False
            source = source.cast_column(column, feature)
    return source.remove_columns(columns)
