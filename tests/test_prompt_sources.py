"""What people hand over as prompts: each is read as what it is meant to be, or refused with the way out."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest

from hf_recontrol import CompareSettings
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.pipelines.compare import _prompts

CHAT = [{"role": "system", "content": "be [brief]"}, {"role": "user", "content": 'it\'s "w5"'}]
ANSWER = {"role": "assistant", "content": "w9"}


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_chats_in_a_csv_file_are_chats_if_they_are_json(tmp_path, column):
    path = tmp_path / "p.csv"
    pd.DataFrame({column: [json.dumps(CHAT), json.dumps(CHAT, indent=1)]}).to_csv(path, index=False)
    assert [row["prompt"] for row in load_prompts(path).rows] == [CHAT, CHAT]
    for chats in ([CHAT], [np.array(CHAT)], [json.dumps(CHAT)[:-2] + ",}]"]):
        pd.DataFrame({column: chats}).to_csv(path, index=False)
        with pytest.raises(ValueError, match=r"list of chat messages as Python prints it.*`json.dumps`"):
            load_prompts(path)
    answered = json.dumps([*CHAT, ANSWER])
    assert load_prompts([{"messages": answered}]).rows == load_prompts([answered], on_answers="cut").rows


def test_texts_that_only_mention_roles_are_texts():
    texts = ['[{"role": "user"}] What is this?', '[{"name": "role"}]', "[1, 2]", '{"role": "user"}', '["role"]', "[{"]
    assert [row["prompt"] for row in load_prompts(texts).rows] == texts


def test_other_texts_in_a_column_of_messages_are_refused_by_row():
    rows = [{"messages": CHAT}, {"messages": "w5"}]
    with pytest.raises(ValueError, match=r"row 1: the column 'messages' holds a text.*--prompt-column messages"):
        load_prompts(rows)
    assert load_prompts(rows[1:], prompt_column="messages").rows == [{"prompt": "w5"}]


def test_a_transform_of_a_data_set_is_applied():
    data = datasets.Dataset.from_dict({"q": ["w5", "w6"]})
    changed = data.with_transform(lambda batch: {"prompt": [f"Q: {text}" for text in batch["q"]]})
    assert [row["prompt"] for row in load_prompts(changed).rows] == ["Q: w5", "Q: w6"]
    broken = data.with_transform(lambda batch: {"prompt": [text.nothing for text in batch["q"]]})
    with pytest.raises(ValueError, match="row 0: it cannot be read"):
        load_prompts(broken)
    for kind in ("numpy", "torch", "pandas", None):
        assert load_prompts(data.with_format(kind), prompt_column="q").rows[1]["prompt"] == "w6"


FRAME = pd.DataFrame({"prompt": ["w5", "w6"], "score": [1, 2]})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (lambda: [("w5", 1), ("w6", 2)], "row 0: it is a tuple .*give rows as dicts, or texts"),
        (lambda: zip(["w5"], [1], strict=True), "row 0: it is a tuple"),
        (FRAME.itertuples, r"row 0: it is a tuple \(Pandas\).*a DataFrame itself"),
        (FRAME.iterrows, "row 0: it is a tuple"),
        (lambda: CHAT, r"it has \['content', 'role'\].*`\[chat\]`"),
        (lambda: FRAME.set_index("prompt"), r"'prompt' is the DataFrame's index: `frame\.reset_index\(\)`"),
        (
            lambda: {"prompt": FRAME["prompt"], "score": FRAME["score"][::-1]},
            "'prompt' and 'score' have different indexes",
        ),
    ],
)
def test_what_is_not_rows_is_named_as_what_it_is(source, reason):
    with pytest.raises(ValueError, match=reason):
        load_prompts(source())


def test_what_only_looks_like_it_is_read():
    expected = [{"prompt": "w5", "score": 1}, {"prompt": "w6", "score": 2}]
    assert load_prompts({"prompt": FRAME["prompt"], "score": FRAME["score"]}).rows == expected
    assert load_prompts({"prompt": FRAME["prompt"][::-1], "score": [2, 1]}).rows == expected[::-1]
    assert load_prompts(FRAME.set_index("score")).rows == [{"prompt": "w5"}, {"prompt": "w6"}]
    assert load_prompts([tuple(CHAT)]).rows == [{"prompt": CHAT}]


@pytest.mark.parametrize("prompts", [["w5", "w6"], [CHAT, CHAT[1:]]])
def test_json_files_hold_what_lists_hold(tmp_path, prompts):
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    for name in ("p.json", "p.jsonl"):
        assert load_prompts(tmp_path / name).rows == load_prompts(prompts).rows


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize(("name", "text"), [("p.csv", "prompt,x\nw5,1\n"), ("p.jsonl", '{"prompt": "w5"}\n')])
def test_an_encoding_that_no_mark_names(tmp_path, name, text, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match="without a byte order mark: save the file in UTF-8"):
        load_prompts(tmp_path / name)


def test_a_damaged_line_of_names_is_named(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,"x"y\nw5,1\n')
    with pytest.raises(ValueError, match=r"p\.csv, line 1: a quotation mark"):
        load_prompts(tmp_path / "p.csv", on_bad_rows="skip")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('prompt, x\n"w5", "a, b"\n', [("w5", "a, b")]),
        ('x, "prompt"\n1, "w5"\n', [("w5", 1)]),
        ('prompt,x\n w5," ""a"" b"\n', [(" w5", ' "a" b')]),
        ('prompt,x\n w5, "a" b\n', [(" w5", ' "a" b')]),
    ],
)
def test_blanks_before_quotation_marks(tmp_path, text, rows):
    (tmp_path / "p.csv").write_text(text)
    assert [(row["prompt"], row["x"]) for row in load_prompts(tmp_path / "p.csv").rows] == rows


def test_settings_of_data_sets_are_refused_where_they_say_nothing(tmp_path):
    rows = {"prompt": ["w5", "w6"]}
    (tmp_path / "p.jsonl").write_text('{"prompt": "w5"}\n')
    whole = datasets.Dataset.from_dict(rows)
    whole.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=whole).save_to_disk(tmp_path / "splits")
    for source in (tmp_path / "p.jsonl", whole, rows, ["w5"], whole.to_pandas(), tmp_path / "saved"):
        for name, value in (("split", "test"), ("config_name", "en"), ("streaming", True)):
            with pytest.raises(ValueError, match=rf"`{name}={value!r}` .* has no effect on"):
                load_prompts(source, **{name: value})
    for source in (datasets.DatasetDict(test=whole), tmp_path / "splits"):
        assert len(load_prompts(source, split="test")) == 2
        with pytest.raises(ValueError, match=r"`config_name='en'` .* has no effect on"):
            load_prompts(source, split="test", config_name="en")
    named = datasets.Dataset.from_dict(rows, split="test")
    assert len(load_prompts(named, split="test")) == 2
    with pytest.raises(ValueError, match=r"`split='validation'` .* has no effect on"):
        load_prompts(named, split="validation")


def test_of_two_sources_a_setting_may_be_for_one():
    splits = datasets.DatasetDict(test=datasets.Dataset.from_dict({"prompt": ["w5", "w6"]}))
    settings = CompareSettings(split="test")
    for prompts, held in ((splits, ["w7"]), (["w7"], splits), (load_prompts(["w7"]), ["w8"])):
        found = _prompts(prompts, held, settings, True, [])
        assert [len(each) for each in found] == [
            len(load_prompts(p, settings)) if p is splits else 1 for p in (prompts, held)
        ]
    for held in (None, ["w8"]):
        with pytest.raises(ValueError, match=r"`split='test'` .* has no effect on"):
            _prompts(["w7"], held, settings, True, [])
