"""Random tables of prompts in every container: each is read as what it is, or an error names what is wrong where."""

import csv
import io
import json
import math
from functools import cache

import datasets
import hypothesis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import Rollout, load_rollouts, save_rollouts
from hf_recontrol.data.templating import PromptEncoder
from hf_recontrol.settings import TemplateSettings

from .tiny_tokenizer import byte_tokenizer, chatml_tokenizer

START, END = 258, 259
SIGNS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|im_start|>user\n",
    "<end>",
    "\n\nHuman: ",
    "\n\nAssistant:",
    ",",
    ";",
    '"',
    "\t",
    "\n",
    "\r",
)
CHARACTERS = st.sampled_from("ab 1é\u2028\x00\ufeff\U0001f44d")
TEXTS = st.lists(st.one_of(CHARACTERS, st.sampled_from(SIGNS)), max_size=8).map("".join)
NAMES = st.sampled_from(["x", "score", "reward", "completion", "prompts", "Ünï", "", "tools", "chat_template_kwargs"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    TEXTS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
ODD = st.one_of(
    st.datetimes(),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.decimals(),
    st.uuids(),
    st.binary(max_size=4),
    st.sets(st.integers(0, 9), max_size=3),
    st.sampled_from(
        [
            np.int8(3),
            np.float64("nan"),
            np.datetime64("2026-01-02"),
            np.datetime64("NaT"),
            np.arange(6).reshape(2, 3),
            np.array(["a", None], object),
            pd.NaT,
            pd.NA,
            pd.Timestamp(5, unit="s"),
            pd.Timedelta(5, unit="s"),
            pa.scalar({"a": [1, None]}),
            2**100,
            1j,
            object(),
            "\ud800",
            {1: 2, "1": 3},
        ]
    ),
)
MESSAGES = st.lists(
    st.builds(
        lambda role, content, more: {"role": role, "content": content} | more,
        st.sampled_from(["user", "user", "system", "assistant", "tool", "human"]),
        st.one_of(
            TEXTS, TEXTS, st.none(), TEXTS.map(lambda text: [{"type": "text", "text": text}]), st.integers(0, 2)
        ),
        st.dictionaries(st.sampled_from(["name", "tool_calls", "turn"]), VALUES, max_size=2),
    ),
    max_size=3,
)
PROMPTS = st.one_of(
    st.lists(TEXTS, min_size=1, max_size=4), st.lists(st.one_of(MESSAGES, VALUES), min_size=1, max_size=3)
)

ANYTHING = st.one_of(VALUES, VALUES, ODD)


@st.composite
def tables(draw, values=ANYTHING, prompts=PROMPTS, names=NAMES):
    """(the column with the prompts, rows that all have the same columns)."""
    column = draw(st.sampled_from(["prompt", "prompt", "messages", "question"]))
    prompts = draw(prompts)
    columns = draw(st.lists(names.filter(lambda name: name != column), unique=True, max_size=3))
    rows = [{column: prompt} | {name: draw(values) for name in columns} for prompt in prompts]
    return column, rows


def is_plain(value):
    """Whether JSON holds a value as it is."""
    if isinstance(value, dict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def load(source, column, **settings):
    """Prompts, or the message of an error that says what is wrong with which row or column."""
    try:
        return load_prompts(source, prompt_column="prompt" if column == "messages" else column, **settings)
    except (ValueError, TypeError) as error:
        message = str(error)
    assert any(sign in message for sign in ("row ", "line ", "column", "No prompts")), message
    return message


@cache
def encoders():
    return [PromptEncoder(tokenizer, TemplateSettings()) for tokenizer in (chatml_tokenizer(), byte_tokenizer())]


def check(found, tmp_path):
    """What holds of all prompts that were read, whatever they were read from."""
    assert found.rows and json.dumps(found.rows, allow_nan=False)
    assert load_prompts(found.rows, on_answers="keep").rows == found.rows, "read again"
    rollouts = [
        Rollout(row["prompt"], "", [1], [2], True, columns={key: row[key] for key in row if key != "prompt"})
        for row in found.rows
    ]
    save_rollouts(rollouts, tmp_path / "r.parquet")
    assert load_rollouts(tmp_path / "r.parquet") == rollouts
    for row in found.rows:
        for encoder in encoders():
            try:
                ids = encoder.encode(row)
            except ValueError:
                continue
            if encoder.tokenizer.chat_template is None or not isinstance(row["prompt"], str):
                continue
            if encoder.is_formatted(row["prompt"]):
                assert encoder.tokenizer.decode(ids) == row["prompt"]
            else:
                assert ids.count(START) - bool(row.get("tools")) == 3, "the template's own alone"
                assert row["prompt"] in encoder.tokenizer.decode(ids)


SETTINGS = st.fixed_dictionaries(
    {"on_bad_rows": st.sampled_from(["error", "skip"]), "on_answers": st.sampled_from(["error", "cut", "keep"])}
)


@hypothesis.settings(max_examples=150)
@given(tables(), SETTINGS, st.sampled_from(["list", "generator", "dict", "tuple"]))
def test_rows_in_memory(tmp_path, recontrol_warnings, table, settings, container):
    recontrol_warnings.clear()
    column, rows = table
    source = {
        "list": lambda: rows,
        "tuple": lambda: tuple(rows),
        "generator": lambda: (row for row in rows),
        "dict": lambda: {name: [row[name] for row in rows] for name in rows[0]},
    }[container]()
    found = load(source, column, **settings)
    if isinstance(found, str):
        return
    for row, number in zip(found.rows, found.numbers, strict=True):
        given = rows[number]
        if is_plain(given[column]):
            whole = given[column] if isinstance(row["prompt"], str) else given[column][: len(row["prompt"])]
            assert whole == row["prompt"] or (settings["on_answers"] == "cut" and whole.startswith(row["prompt"]))
        for name in given.keys() - {column}:
            if name not in row:
                assert any(f"column {name!r} is left out" in warning for warning in recontrol_warnings)
            elif is_plain(given[name]):
                assert row[name] == given[name] and type(row[name]) is type(given[name])
    assert len(found.rows) == len(rows) or settings["on_bad_rows"] == "skip"
    check(found, tmp_path)


@hypothesis.settings(max_examples=100)
@given(
    tables(values=st.one_of(SCALARS, st.datetimes(), st.binary(max_size=3))),
    st.sampled_from(["table", "parquet", "dataset", "stream", "frame"]),
)
def test_tables(tmp_path, recontrol_warnings, table, container):
    column, rows = table
    try:
        arrow = pa.Table.from_pylist(rows)
        dataset = datasets.Dataset(arrow)
        pq.write_table(arrow, tmp_path / "p.parquet")
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        hypothesis.reject()  # Arrow has no such table
    source = {
        "table": lambda: arrow,
        "parquet": lambda: tmp_path / "p.parquet",
        "dataset": lambda: dataset,
        "stream": lambda: dataset.to_iterable_dataset(),
        "frame": lambda: arrow.to_pandas(),
    }[container]()
    found = load(source, column, on_bad_rows="skip", on_answers="keep")
    if isinstance(found, str):
        return
    for row, number in zip(found.rows, found.numbers, strict=True):
        if isinstance(rows[number][column], str):
            assert row["prompt"] == rows[number][column]
        for name in row.keys() & rows[number].keys() - {column, "tools", "chat_template_kwargs"}:
            given = arrow[name].to_pylist()[number]
            assert row[name] == given or not is_plain(given)
    check(found, tmp_path)


LINES = st.one_of(
    st.binary(max_size=40), st.just(b'{"prompt": "a", "x": '), st.just(b"prompt,x\n"), st.just(b'{"prompt": "b"}\n')
)


@given(
    st.lists(LINES, max_size=5).map(b"".join),
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"]),
)
def test_files_of_anything(tmp_path, recontrol_warnings, content, suffix):
    path = tmp_path / f"p{suffix}"
    path.write_bytes(content)
    try:
        found = load_prompts(path, on_bad_rows="skip")
    except ValueError as error:
        assert path.name in str(error)
    else:
        check(found, tmp_path)


@given(tables(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]), st.booleans())
def test_lines_of_json(tmp_path, recontrol_warnings, table, encoding, ascii_only):
    column, rows = table
    try:
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
        (tmp_path / "p.jsonl").write_bytes(text.encode(encoding))
    except (TypeError, UnicodeEncodeError):
        hypothesis.reject()  # no JSON
    found = load(tmp_path / "p.jsonl", column, on_bad_rows="skip", on_answers="keep")
    in_memory = load([json.loads(json.dumps(row)) for row in rows], column, on_bad_rows="skip", on_answers="keep")
    assert getattr(found, "rows", None) == getattr(in_memory, "rows", None)


@given(
    tables(
        values=st.one_of(TEXTS, st.integers(-99, 10**20).map(str)),
        prompts=st.lists(TEXTS, min_size=1, max_size=4),
        names=NAMES.filter(bool),
    ),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_csv(tmp_path, recontrol_warnings, table, separator, encoding, end):
    column, rows = table
    # Nothing tells the separator of a single column: there it is a comma.
    separator = separator if len(rows[0]) > 1 else ","
    text = io.StringIO(newline="")
    # Where \\r ends no line, the writer puts no quotation marks around it.
    quoting = csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "p.csv").write_bytes(text.getvalue().encode(encoding))
    found = load(tmp_path / "p.csv", column, on_bad_rows="skip", on_answers="keep")
    good = [row for row in rows if row[column].strip() and column != "messages"]
    if isinstance(found, str):
        assert not good
        return
    assert [row["prompt"] for row in found.rows] == [row[column] for row in good]
    for row, source in zip(found.rows, good, strict=True):
        for name in source.keys() - {column}:
            assert (
                str(row[name]) == source[name].strip()
                or row[name] == source[name]
                or (not source[name].strip() and row[name] is None)
                or (separator == ";" and float(source[name].replace(",", ".")) == row[name])
            )
