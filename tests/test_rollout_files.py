"""Rollouts as Parquet files."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from hf_recontrol.data.rollouts import Rollout, load_rollouts, save_rollouts, scoring_of

TEXT = Rollout("é w5", "ü\n", [5], [6, 2], True, [0.5], 0.7, {"topic": "x", "deep": {"a": [1, None]}}, 3, 1)
CHAT = Rollout([{"role": "system", "content": "w5"}, {"role": "user", "content": "w6"}], "", [5], [], False)


@pytest.mark.parametrize("rollouts", [[TEXT], [CHAT], [TEXT, Rollout("w7", "", [7], [], False)], []])
def test_files_round_trip(tmp_path, rollouts):
    path = tmp_path / "deeper" / "rollouts.parquet"
    save_rollouts(rollouts, path)
    assert load_rollouts(path) == rollouts and scoring_of(path) is None


def test_one_reward_is_a_number_and_several_are_a_list(tmp_path):
    save_rollouts([TEXT], tmp_path / "one.parquet", ["length"])
    two = Rollout("w5", "", [5], [6], True, [1.0, -2.0])
    save_rollouts([two], tmp_path / "two.parquet", ["length", "tone"], scoring=3)
    assert pq.read_table(tmp_path / "one.parquet")["reward"].to_pylist() == [0.5]
    assert pq.read_table(tmp_path / "two.parquet")["reward"].to_pylist() == [[1.0, -2.0]]
    assert load_rollouts(tmp_path / "two.parquet") == [two]
    assert scoring_of(tmp_path / "two.parquet") == 3


def test_messages_keep_their_further_keys(tmp_path):
    prompt = [{"role": "user", "content": "w5", "name": "ann"}, {"role": "user", "content": "w6"}]
    save_rollouts([Rollout(prompt, "", [5], [6], True)], tmp_path / "r.parquet")
    assert load_rollouts(tmp_path / "r.parquet")[0].prompt == prompt


RICH = [
    {"role": "user", "content": [{"type": "text", "text": "w5"}], "turn": 1},
    {"role": "assistant", "content": None, "tool_calls": [{"arguments": {"days": [2, "x", {"deep": None}]}}]},
    {"role": "tool", "content": "21", "failed": False},
]


@pytest.mark.parametrize(
    "prompts", [[RICH], [RICH, CHAT.prompt], ["w5", CHAT.prompt], [[{"role": "user", "x": None}]]]
)
def test_messages_keep_all_that_they_hold(tmp_path, prompts):
    """See trl#2455."""
    rollouts = [Rollout(prompt, "", [5], [6], True) for prompt in prompts]
    save_rollouts(rollouts, tmp_path / "r.parquet", scoring=2)
    assert load_rollouts(tmp_path / "r.parquet") == rollouts and scoring_of(tmp_path / "r.parquet") == 2


def test_chats_of_texts_are_lists_of_messages_for_other_readers_too(tmp_path):
    save_rollouts([CHAT], tmp_path / "r.parquet")
    assert pq.read_table(tmp_path / "r.parquet")["prompt"].to_pylist() == [CHAT.prompt]


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b'{"prompt": "a"}\n'])
def test_files_that_are_no_parquet_are_named(tmp_path, content):
    path = tmp_path / "r.parquet"
    path.write_bytes(content)
    for read in (load_rollouts, scoring_of):
        with pytest.raises(ValueError, match=r"r\.parquet is not a complete Parquet file"):
            read(path)


def test_other_tables_and_missing_files_say_how_to_make_rollouts(tmp_path):
    import pyarrow as pa

    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="recontrol rollout"):
        load_rollouts(tmp_path / "other.parquet")
    for odd in (b"no JSON", b"[3]"):
        table = pa.table({"prompt": ["a"]}).replace_schema_metadata({b"hf_recontrol": odd})
        pq.write_table(table, tmp_path / "other.parquet")
        for read in (load_rollouts, scoring_of):
            with pytest.raises(ValueError, match=r"other\.parquet does not hold rollouts"):
                read(tmp_path / "other.parquet")
    with pytest.raises(OSError, match=r"absent\.parquet"):
        load_rollouts(tmp_path / "absent.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"holds no manifest\.json"):
        load_rollouts(tmp_path / "folder")
    (tmp_path / "folder" / "manifest.json").write_text(json.dumps({"kind": "states", "complete": True}))
    with pytest.raises(ValueError, match="holds states, not rollouts"):
        load_rollouts(tmp_path / "folder")


def test_a_rollout_of_other_types_is_refused_by_the_field_s_name():
    ids = torch.tensor([5])
    for values, said in (
        (("w5", "", ids, [6], True), "`prompt_ids` must be a list of token ids, got Tensor"),
        (("w5", "", [5], ids, True), "`completion_ids` must be a list of token ids, got Tensor"),
        (("w5", "", [5], [6], True, 0.7), r"`reward` must be a list .* such as \[0\.7\], got 0\.7"),
    ):
        with pytest.raises(TypeError, match=said):
            Rollout(*values)
