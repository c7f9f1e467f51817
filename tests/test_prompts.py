"""Prompts from files, data sets and memory: what is read, what is kept of it, and what is refused."""

import csv
import datetime
import decimal
import gzip
import json
import uuid
from collections import OrderedDict
from functools import reduce
from types import MappingProxyType

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_recontrol import generate_rollouts
from hf_recontrol.collection.scoring.responses import check_rows
from hf_recontrol.collection.scoring.rewards import named_rewards
from hf_recontrol.data.prompts import BadRow, Prompts, load_prompts, report_bad_rows
from hf_recontrol.settings import PromptSettings

from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

ROWS = [
    {"prompt": "w5 w6", "topic": "a"},
    {"prompt": 'line\nbreak, "quoted"', "topic": "b"},
    {"prompt": "é", "topic": "c"},
]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "w5"}]
ANSWER = {"role": "assistant", "content": "w9"}


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(jsonl(rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(jsonl(rows))
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.json", "p.csv", "p.parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, name):
    found = load_prompts(write(tmp_path / name))
    assert found.rows == ROWS and found.numbers == [0, 1, 2] and not found.bad_rows
    assert found.fingerprint == load_prompts(ROWS).fingerprint != load_prompts(ROWS[:2]).fingerprint
    assert load_prompts(tmp_path / name, limit=2).rows == ROWS[:2]


def test_data_sets_from_disk_from_memory_and_streamed(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl")
    expected = load_prompts(ROWS).fingerprint
    assert load_prompts(dataset).fingerprint == expected
    assert load_prompts(tmp_path / "saved").fingerprint == expected
    assert load_prompts(tmp_path / "folder").fingerprint == expected
    assert load_prompts(tmp_path / "folder", streaming=True, limit=2).rows == ROWS[:2]
    assert load_prompts(tmp_path / "splits", split="test").rows == ROWS[2:]
    with pytest.raises(ValueError, match="no split 'absent', it has"):
        load_prompts(tmp_path / "splits", split="absent")


def test_a_limited_stream_is_not_read_further():
    def rows():
        yield from ROWS
        raise AssertionError("read too far")

    assert load_prompts(datasets.IterableDataset.from_generator(rows), limit=3).rows == ROWS


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_messages_and_what_arrow_adds_to_them(tmp_path, name):
    rows = [{"prompt": MESSAGES}, {"prompt": [{"role": "user", "content": "w6", "name": "ann"}]}]
    assert load_prompts(write(tmp_path / name, rows)).rows == rows


def test_a_conversation_is_asked_for_its_last_answer():
    assert load_prompts([{"messages": [*MESSAGES, ANSWER]}]).rows == [{"prompt": MESSAGES}]


def test_another_column_can_hold_the_prompts(tmp_path):
    path = write(tmp_path / "p.csv", [{"question": "w5", "x": "1"}])
    assert load_prompts(path, prompt_column="question").rows == [{"prompt": "w5", "x": 1}]
    with pytest.raises(ValueError, match=r"no column 'prompt', it has \['question', 'x'\]"):
        load_prompts(path)


def test_our_own_names_are_only_columns():
    row = {"prompt": "w5", "reward": 1.0, "completion": "w6", "sample": 3}
    assert load_prompts([row]).rows == [row]


BAD = [
    (b"not json\n", "not JSON"),
    (b'{"prompt": "\xff"}\n', "not UTF-8"),
    (b'["a"]\n', "no list of messages"),
    (b'{"prompt": 3}\n', "is int"),
    (b'{"prompt": "  "}\n', "empty"),
    (b'{"prompt": null}\n', "is NoneType"),
    (b'{"prompt": []}\n', "empty"),
    (b'{"prompt": [{"role": "user"}]}\n', "role and a content"),
    (b'{"prompt": [{"role": "user", "content": "a"}]}\n', "chat messages among texts"),
    (b'{"prompt": [{"role": "user", "content": 3}]}\n', "content is int"),
    (b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}\n', "part of the type 'image'"),
    (b'{"prompt": [{"role": "user", "content": ""}]}\n', "empty"),
    (b'{"prompt": "\\ud800"}\n', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_row_is_named_with_its_line_or_left_out(tmp_path, line, reason, recontrol_warnings):
    path = tmp_path / "p.jsonl"
    path.write_bytes(jsonl(ROWS[:1]) + b"\n" + line + jsonl(ROWS[2:]))
    with pytest.raises(ValueError, match=r"p\.jsonl, line 3: .*on-bad-rows skip") as raised:
        load_prompts(path)
    assert reason in str(raised.value)
    found = load_prompts(path, on_bad_rows="skip")
    assert found.rows == [ROWS[0], ROWS[2]] and found.numbers == [0, 2], "the others keep their numbers"
    assert [row.location for row in found.bad_rows] == [f"{path}, line 3"] and "line 3" in recontrol_warnings[0]


def test_a_bad_csv_row_is_named_with_its_line(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b'prompt,topic\n"two\nlines",a\n,b\n\xff,c\n')
    with pytest.raises(ValueError, match=r"2 rows cannot be used: .*line 4: the prompt is empty; .*line 5: not UTF-8"):
        load_prompts(path)


def test_texts_among_messages_and_answered_prompts_are_bad():
    with pytest.raises(ValueError, match="row 1: a text among chat messages"):
        load_prompts([MESSAGES, "w5"])
    with pytest.raises(ValueError, match="ends with the assistant's turn"):
        load_prompts([[*MESSAGES, ANSWER]])


@pytest.mark.parametrize("take", [lambda prompts: prompts, lambda prompts: prompts.take([1, 0])])
@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("p.jsonl", '{"prompt": "w5", "score": 1}\n\n\n{"prompt": "w6 w7 w8", "score": null}\n', "line 4"),
        ("p.csv", 'prompt,score\n"w5\n",1\nw6 w7 w8,\n', "line 4"),
        ("p.json", '[{"prompt": "w5", "score": 1}, {"prompt": "w6 w7 w8", "score": null}]', "row 1"),
    ],
)
def test_a_row_that_later_work_cannot_use_is_named_by_its_place_in_the_file(tmp_path, take, name, text, line):
    path = tmp_path / name
    path.write_text(text)
    prompts = take(load_prompts(path))
    with pytest.raises(ValueError, match=rf"{name}, {line}: the column score holds None"):
        check_rows(named_rewards("score", prompts.columns), prompts, "error")
    with pytest.raises(ValueError, match=rf"{name}, {line}: it has 3 tokens"):
        generate_rollouts(tiny_model("llama"), tiny_tokenizer(), prompts, max_new_tokens=1, max_prompt_tokens=2)


def test_only_bad_rows_are_an_error_in_any_case(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(ValueError, match="line 1"):
        load_prompts(tmp_path / "p.jsonl", on_bad_rows="skip")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_no_rows_are_an_error(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"No prompts: .*p\.jsonl holds no rows"):
        load_prompts(tmp_path / "p.jsonl")


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(OSError, match=r"absent\.jsonl is no file"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(OSError, match="nor a data set that could be loaded"):
        load_prompts(tmp_path / "absent")
    (tmp_path / "p.txt").write_text("w5")
    with pytest.raises(ValueError, match=r"p\.txt: expected a file that ends in"):
        load_prompts(tmp_path / "p.txt")
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"p\.parquet is not a complete Parquet file"):
        load_prompts(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="on_bad_rows"):
        load_prompts(ROWS, on_bad_rows="ignore")


def test_a_report_names_the_first_and_counts_the_others():
    rows = [BadRow(f"row {i}", "odd") for i in range(8)]
    with pytest.raises(ValueError, match=r"8 rows cannot be used: row 0: odd; .*row 4: odd; and 3 more\."):
        report_bad_rows(rows, "error")
    report_bad_rows([], "error")


CALL = {"name": "weather", "arguments": {"days": 2, "all": True, "unit": None, "where": [[1.5], "x"]}}
RICH = [
    {"role": "user", "content": [{"type": "text", "text": "w5"}], "turn": 1},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "21", "failed": False},
]


def test_messages_keep_all_that_they_hold(tmp_path):
    rows = [{"prompt": RICH}, {"prompt": [{"role": "user", "content": "w6"}]}]
    assert load_prompts(write(tmp_path / "p.jsonl", rows)).rows == rows == load_prompts(rows).rows
    with pytest.raises(ValueError, match="role and a content"):
        load_prompts([[{"role": "assistant", "content": None, "tool_calls": None}, MESSAGES[1]]])


@pytest.mark.parametrize("kind", ["parquet", "dataset", "table", "pandas"])
def test_what_arrow_adds_is_not_taken_for_the_users(tmp_path, kind):
    """Each tool has the keys of all others in Arrow, see trl#5311."""
    tools = [{"name": "a", "parameters": {"x": {"type": "int"}}}, {"name": "b", "parameters": {"y": {"type": "str"}}}]
    rows = [
        {
            "prompt": [{"role": "user", "content": "w5", "turn": 1}],
            "tools": tools,
            "chat_template_kwargs": {"a": False},
        },
        {"prompt": [{"role": "user", "content": "w6"}], "tools": None, "chat_template_kwargs": {"b": 1}},
    ]
    table = pa.Table.from_pylist(rows)
    source = {
        "parquet": lambda: write(tmp_path / "p.parquet", rows),
        "dataset": lambda: datasets.Dataset.from_list(rows),
        "table": lambda: table,
        "pandas": table.to_pandas,
    }[kind]()
    assert load_prompts(source).rows == rows


def test_json_in_arrow_is_what_it_says(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "w5", "x": None}, CALL | {"role": "user", "content": "w6"}]}]
    dataset = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in str(dataset.features)
    dataset.to_parquet(tmp_path / "p.parquet")
    assert load_prompts(dataset).rows == load_prompts(tmp_path / "p.parquet").rows
    assert load_prompts(dataset).rows[0]["prompt"][1]["arguments"] == CALL["arguments"]


def test_columns_that_json_does_not_know_are_kept_as_what_it_does():
    row = {
        "prompt": "w5",
        "time": datetime.datetime(2026, 1, 2, 3, 4),
        "day": datetime.date(2026, 1, 2),
        "hour": datetime.time(3, 4),
        "took": datetime.timedelta(minutes=2),
        "price": decimal.Decimal("1.10"),
        "count": decimal.Decimal(2**70),
        "id": uuid.UUID(int=5),
        "text": "é".encode(),
        "missing": float("nan"),
        "never": pd.NaT,
        "na": pd.NA,
        "number": np.float32(0.5),
        "flag": np.bool_(True),
        "word": np.str_("a"),
        "array": np.arange(4).reshape(2, 2),
        "times": np.array(["2026-01-02T03", "NaT"], "datetime64[ns]"),
        "seconds": np.timedelta64(3, "ms"),
        "stamp": pd.Timestamp("2026-01-02 03:04", tz="UTC"),
        "deep": {1: (None, {"a": {"c", "b"}})},
    }
    assert load_prompts([row]).rows == [
        {
            "prompt": "w5",
            "time": "2026-01-02T03:04:00",
            "day": "2026-01-02",
            "hour": "03:04:00",
            "took": 120.0,
            "price": 1.1,
            "count": 2**70,
            "id": "00000000-0000-0000-0000-000000000005",
            "text": "é",
            "missing": None,
            "never": None,
            "na": None,
            "number": 0.5,
            "flag": True,
            "word": "a",
            "array": [[0, 1], [2, 3]],
            "times": ["2026-01-02T03:00:00.000000000", None],
            "seconds": 0.003,
            "stamp": "2026-01-02T03:04:00+00:00",
            "deep": {"1": [None, {"a": ["b", "c"]}]},
        }
    ]


LEFT_OUT = [
    (b"\xff\xfe\x00", "bytes that are no text"),
    ("\ud800", "text that is not UTF-8"),
    (float("inf"), "an infinite number"),
    (2**20_000, "a number of 20001 bits"),
    (object(), "it holds object"),
    (lambda: 1, "it holds function"),
    (1j, "it holds complex"),
    ({1: "a", "1": "b"}, "two keys '1'"),
]
LEFT_OUT.append((reduce(lambda value, _: [value], range(200), []), "nested too deeply"))


@pytest.mark.parametrize(("value", "reason"), LEFT_OUT, ids=[reason for _, reason in LEFT_OUT])
def test_a_column_that_cannot_be_kept_is_left_out_with_one_warning(value, reason, recontrol_warnings):
    rows = [{"prompt": "w5", "odd": 1, "x": 1}, {"prompt": "w6", "odd": value, "x": 2}, {"prompt": "w7", "odd": value}]
    assert load_prompts(rows).rows == [{"prompt": f"w{5 + i}", "x": x} for i, x in enumerate([1, 2, None])]
    assert len(recontrol_warnings) == 1
    assert "The column 'odd' is left out" in recontrol_warnings[0] and reason in recontrol_warnings[0]
    assert "(row 1)" in recontrol_warnings[0]


def test_images_are_left_out_without_being_read(recontrol_warnings):
    features = datasets.Features({"prompt": datasets.Value("string"), "seen": datasets.List(datasets.Image())})
    images = [{"bytes": b"not even an image", "path": None}]
    dataset = datasets.Dataset.from_dict({"prompt": ["w5"], "seen": [images]}, features=features)
    for source in (dataset, dataset.to_iterable_dataset()):
        assert load_prompts(source).rows == [{"prompt": "w5"}]
    assert recontrol_warnings == ["The column 'seen' is left out: it holds Image."] * 2
    with pytest.raises(ValueError, match="the column 'seen' holds"):
        load_prompts(dataset, prompt_column="seen")


def test_arrow_values_that_python_has_not_are_left_out(tmp_path, recontrol_warnings):
    far = pa.array([2**40, 5], pa.timestamp("s"))
    twice = pa.table([pa.array(["w5", "w6"]), pa.array([1, 2]), pa.array([3, 4]), far], ["prompt", "x", "x", "when"])
    pq.write_table(twice, tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet").rows == [{"prompt": "w5"}, {"prompt": "w6"}]
    assert sorted(recontrol_warnings)[0].startswith("The column 'when' is left out: it cannot be read")
    assert sorted(recontrol_warnings)[1] == "The column 'x' is left out: 2 columns have this name."
    with pytest.raises(ValueError, match=r"p\.parquet has 2 columns 'x'"):
        load_prompts(tmp_path / "p.parquet", prompt_column="x")
    with pytest.raises(ValueError, match="The table has 2 columns 'x'"):
        load_prompts(twice, prompt_column="x")


def test_a_column_named_prompt_does_not_stand_for_the_one_that_was_named(recontrol_warnings):
    rows = [{"prompt": "w6", "question": "w5"}]
    assert load_prompts(rows, prompt_column="question").rows == [{"prompt": "w5"}]
    assert "'prompt' is left out: the prompts, which 'question' holds, take its name" in recontrol_warnings[0]
    with pytest.raises(ValueError, match="no column 'qestion'"):
        load_prompts([{"messages": MESSAGES}], prompt_column="qestion")


CSV = [
    ("prompt;score\nw5;1\nw6;2.5\n", "utf-8"),
    ("prompt\tscore\nw5\t1\nw6\t2.5\n", "utf-8"),
    ("\nprompt, score\r\nw5,1\r\n\r\nw6,2.5\r\n", "utf-8-sig"),
    ("prompt,score\nw5,1\nw6,2.5\n", "utf-16"),
    ("score,prompt\n1,w5\n2.5,w6\n", "utf-8"),
]


@pytest.mark.parametrize(("text", "encoding"), CSV)
def test_separators_encodings_and_numbers_of_csv(tmp_path, text, encoding):
    (tmp_path / "p.csv").write_bytes(text.encode(encoding))
    assert load_prompts(tmp_path / "p.csv").rows == [{"prompt": "w5", "score": 1}, {"prompt": "w6", "score": 2.5}]


def test_only_columns_of_plain_numbers_are_numbers(tmp_path, recontrol_warnings):
    (tmp_path / "p.tsv").write_text("prompt\tid\tmixed\tgap\n123\t007\t1\t1\n4\t008\tx\t\n")
    assert load_prompts(tmp_path / "p.tsv").rows == [
        {"prompt": "123", "id": "007", "mixed": "1", "gap": 1},
        {"prompt": "4", "id": "008", "mixed": "x", "gap": None},
    ]
    assert [
        warning for warning in recontrol_warnings if "'mixed'" in warning and "'x'" in warning and "line 3" in warning
    ]
    assert len(recontrol_warnings) == 1


@pytest.mark.parametrize(
    ("separator", "texts", "values"),
    [
        (",", ["1", "+1", ".5", "1e3", "nan", "", " 2. ", "-3"], [1, 1, 0.5, 1000.0, None, None, 2.0, -3]),
        (";", ["1,5", "-,5", "2", "NaN"], [1.5, -0.5, 2, None]),
        (";", ["1.5", "2"], [1.5, 2]),
        (",", ["007", "008"], ["007", "008"]),
        (",", ["nan", "nan"], ["nan", "nan"]),
    ],
)
def test_numbers_of_csv(tmp_path, separator, texts, values):
    (tmp_path / "p.csv").write_text(f"prompt{separator}x\n" + "".join(f"w5{separator}{text}\n" for text in texts))
    assert [row["x"] for row in load_prompts(tmp_path / "p.csv").rows] == values


@pytest.mark.parametrize(
    "texts", [["1.234", "1,5"], ["1", "007"], ["1", "1e999"], ["1", "inf"], ["1", "1_0"], ["1", "9" * 5000]]
)
def test_numbers_and_other_texts_of_csv_stay_texts_with_a_warning(tmp_path, recontrol_warnings, texts):
    (tmp_path / "p.csv").write_text("prompt;x\n" + "".join(f"w5;{text}\n" for text in texts))
    assert [row["x"] for row in load_prompts(tmp_path / "p.csv").rows] == texts
    assert len(recontrol_warnings) == 1 and "The column 'x'" in recontrol_warnings[0]


def test_long_csv_fields(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path / "p.csv", [{"prompt": "w5 " * 100_000, "x": "y"}])
    assert len(load_prompts(path).rows[0]["prompt"]) == 300_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"prompt,x\nHello, how are you,1\n", "line 2: 3 fields under 2 names: a text that holds ',' needs quotation"),
        (b"prompt,x\ncaf\xe9,1\nw6,2\n", "line 2: not UTF-8 text: save the file in UTF-8"),
    ],
)
def test_broken_csv_is_not_read_as_something_else(tmp_path, content, reason):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        load_prompts(tmp_path / "p.csv")
    assert reason in str(raised.value)


@pytest.mark.parametrize("on_bad_rows", ["error", "skip"])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('prompt,x\n"Hello,1\nw6,2\n', 2),
        ('prompt,x\nw5,1\n"He said "hi" to me\nand left",b\nlast one,c\n', 3),
        ('prompt,x\nw5,1\n"w6,2\n' + "w7,3\n" * 199, 3),
    ],
)
def test_nobody_knows_where_rows_begin_behind_an_unpaired_quotation_mark(tmp_path, content, line, on_bad_rows):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"p\.csv, line {line}: a quotation mark has no partner"):
        load_prompts(tmp_path / "p.csv", on_bad_rows=on_bad_rows)


def test_some_of_a_data_set_s_prompts_are_still_of_it():
    prompts = Prompts([{"prompt": f"w{i}"} for i in range(4)], list(range(4)), dataset="org/data")
    assert prompts.take([2]).dataset == load_prompts(prompts, limit=2).dataset == "org/data"


def test_json_in_other_encodings(tmp_path):
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "p.json").write_bytes(json.dumps(ROWS, ensure_ascii=False).encode(encoding))
        (tmp_path / "p.jsonl").write_bytes(jsonl(ROWS).decode().encode(encoding))
        assert load_prompts(tmp_path / "p.json").rows == load_prompts(tmp_path / "p.jsonl").rows == ROWS
    (tmp_path / "p.json").write_bytes('[{"prompt": "é"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"p\.json is not UTF-8 text: save the file in UTF-8"):
        load_prompts(tmp_path / "p.json")
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS))[:-9])
    with pytest.raises(ValueError, match=r"p\.jsonl\.gz is damaged"):
        load_prompts(tmp_path / "p.jsonl.gz")


COLUMNS = {"prompt": ["w5", "w6"], "topic": ["a", "b"]}
PAIRS = [{"prompt": "w5", "topic": "a"}, {"prompt": "w6", "topic": "b"}]
CONTAINERS = {
    "frame": lambda: pd.DataFrame(COLUMNS),
    "dict": lambda: COLUMNS,
    "dict of arrays": lambda: {name: np.array(values) for name, values in COLUMNS.items()},
    "dict of series": lambda: {name: pd.Series(values) for name, values in COLUMNS.items()},
    "table": lambda: pa.table(COLUMNS),
    "batch": lambda: pa.record_batch(COLUMNS),
    "reader": lambda: pa.table(COLUMNS).to_reader(),
    "dataset": lambda: datasets.Dataset.from_dict(COLUMNS),
    "numpy data set": lambda: datasets.Dataset.from_dict(COLUMNS).with_format("numpy"),
    "frames data set": lambda: datasets.Dataset.from_dict(COLUMNS).with_format("pandas"),
    "splits": lambda: datasets.DatasetDict(train=datasets.Dataset.from_dict(COLUMNS)),
    "generator": lambda: (row for row in PAIRS),
    "mappings": lambda: [MappingProxyType(PAIRS[0]), OrderedDict(PAIRS[1])],
    "array of rows": lambda: np.array(PAIRS),
    "series of rows": lambda: pd.Series(PAIRS),
    "arrow rows": lambda: pa.array(PAIRS),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_of_rows(make):
    """Not their columns' names, see peft#1729."""
    assert load_prompts(make()).rows == PAIRS
    assert load_prompts(make()).fingerprint == load_prompts(PAIRS).fingerprint


def test_tables_of_other_libraries():
    class Frame:
        """What polars shows of a DataFrame."""

        columns = tuple(COLUMNS)

        def __arrow_c_stream__(self, requested_schema=None):
            return pa.table(COLUMNS).__arrow_c_stream__(requested_schema)

    assert load_prompts(Frame()).rows == PAIRS
    with pytest.raises(TypeError, match="a pandas, Arrow or polars table"):
        load_prompts(object())


def test_of_prompts_that_are_loaded_the_first_ones_are_taken():
    prompts = load_prompts(["w5", "w6", "w7"])
    assert load_prompts(prompts) is prompts
    assert load_prompts(prompts, limit=2).numbers == [0, 1]


@pytest.mark.parametrize("make", [tuple, np.array, pd.Series, pa.array, pa.chunked_array, iter])
def test_containers_of_texts(make):
    texts = [["w5", "w6"]] if make is pa.chunked_array else ["w5", "w6"]
    assert load_prompts(make(texts)).rows == [{"prompt": "w5"}, {"prompt": "w6"}]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"w5", "w6"}, "set, which has no order"),
        ({"a": 1}.keys(), "dict_keys, which has no order"),
        (b"w5", "bytes"),
        (None, "NoneType"),
        (3, "int"),
        (np.zeros((2, 2)), "ndarray"),
        ({"prompt": "w5"}, r"'prompt' is str. To give a single row: `\[row\]`"),
        ({}, "it is empty"),
        ({"train": datasets.Dataset.from_dict(COLUMNS)}, "'train' is Dataset"),
    ],
)
def test_what_holds_no_rows_is_a_type_error(source, said):
    with pytest.raises(TypeError, match=said):
        load_prompts(source)


def test_other_things_that_are_no_prompts(tmp_path):
    with pytest.raises(ValueError, match=r"one length, got \{'prompt': 2, 'x': 1\}"):
        load_prompts({"prompt": ["w5", "w6"], "x": [1]})
    with write(tmp_path / "p.jsonl").open() as file, pytest.raises(TypeError, match="an open file: name it instead"):
        load_prompts(file)
    for name in ("", "How do I boil an egg?", "no/such/name", "a\0b", "Why is the sky blue? " * 99, "egg"):
        with pytest.raises(OSError, match=r"neither a file of prompts.*`\[prompt\]`") as caught:
            load_prompts(name)
        assert len(str(caught.value)) < 1000
    with pytest.raises(OSError, match="is no file"):
        load_prompts("Why is the sky blue? " * 99 + ".json")
    with pytest.raises(ValueError, match="no split 'train', it has"):
        load_prompts(datasets.DatasetDict(test=datasets.Dataset.from_dict(COLUMNS)))


HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: Because."
ASKED = HH.removesuffix(" Because.")


def test_a_prompt_with_its_answer_is_named_and_can_be_cut():
    rows = [{"chosen": HH, "rejected": ASKED + " No."}]
    with pytest.raises(ValueError, match=r"it has \['chosen', 'rejected'\].*--prompt-column chosen --on-answers cut"):
        load_prompts(rows)
    with pytest.raises(ValueError, match=r"row 0: the prompt ends with an answer \('Because\.'\).*--on-answers cut"):
        load_prompts(rows, prompt_column="chosen")
    assert load_prompts(rows, prompt_column="chosen", on_answers="cut").rows[0]["prompt"] == ASKED
    assert load_prompts([HH], on_answers="keep").rows == [{"prompt": HH}]
    # What `keep` is said to do with a chat is what it does.
    with pytest.raises(ValueError, match=r"only texts can be gone on with: .* `on_answers='cut'` \(`--on"):
        load_prompts([[*MESSAGES, ANSWER]], on_answers="keep")
    assert "chats cannot be gone on with" in " ".join(PromptSettings.__doc__.split())
    assert load_prompts([HH], on_answers="cut").rows == load_prompts([ASKED]).rows == [{"prompt": ASKED}]
    for text in ("An essay\n\nAssistant: helper", HH + "\n\nHuman: And?"):
        assert load_prompts([text]).rows == [{"prompt": text}], "no dialogue that ends with an answer"


@pytest.mark.parametrize("column", ["messages", "chosen", "conversation"])
def test_a_named_column_takes_what_messages_takes(column):
    rows = [{column: [*MESSAGES, ANSWER], "prompts": 3}]
    assert load_prompts(rows, prompt_column=column).rows == [{"prompt": MESSAGES, "prompts": 3}]
    assert load_prompts([{"prompt": [*MESSAGES, ANSWER]}], on_answers="cut").rows == [{"prompt": MESSAGES}]


def test_prompts_that_were_put_together_have_a_fingerprint():
    first = Prompts([{"prompt": "w5"}], [0])
    assert first.fingerprint == load_prompts(["w5"]).fingerprint != Prompts([{"prompt": "w6"}], [0]).fingerprint
    with pytest.raises(ValueError, match="Row 3 cannot be stored"):
        Prompts([{"prompt": "w5", "when": datetime.date(2026, 1, 2)}], [3])
