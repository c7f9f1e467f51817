"""What people hand over as prompts: each is read as what it is meant to be, or refused with the way out."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest

from hf_recontrol.data.prompts import load_prompts

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
