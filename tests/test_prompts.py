"""Prompts from files, data sets and memory: what is read, what is refused, and the chat template once."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_recontrol.data.prompts import BadRow, encode_prompt, load_prompts, report_bad_rows

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
        import csv

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
    assert load_prompts(path, prompt_column="question").rows == [{"prompt": "w5", "x": "1"}]
    with pytest.raises(ValueError, match=r"no column 'prompt', it has \['question', 'x'\]"):
        load_prompts(path)


def test_our_own_names_are_only_columns():
    row = {"prompt": "w5", "reward": 1.0, "completion": "w6", "sample": 3}
    assert load_prompts([row]).rows == [row]


BAD = [
    (b"not json\n", "not JSON"),
    (b'{"prompt": "\xff"}\n', "not UTF-8"),
    (b'["a"]\n', "not an object"),
    (b'{"prompt": 3}\n', "is int"),
    (b'{"prompt": "  "}\n', "empty"),
    (b'{"prompt": null}\n', "is NoneType"),
    (b'{"prompt": []}\n', "empty"),
    (b'{"prompt": [{"role": "user"}]}\n', "role and a content"),
    (b'{"prompt": [{"role": "user", "content": "a"}]}\n', "chat messages among texts"),
    (b'{"prompt": "a", "score": NaN}\n', "as JSON"),
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


def test_the_chat_template_is_applied_once():
    tokenizer = tiny_tokenizer(chat=True)
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "w5 w6"}])
    assert ids == encode_prompt(tokenizer, "w5 w6")
    assert tokenizer.decode(ids).replace(" ", "") == "userw5w6<end>assistant"
    # A text that is in the model's format already.
    assert encode_prompt(tokenizer, tokenizer.decode(ids)) == ids
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tiny_tokenizer(), MESSAGES)
    with pytest.raises(ValueError, match="no tokens"):
        encode_prompt(tiny_tokenizer(), "")
