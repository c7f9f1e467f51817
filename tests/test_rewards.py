"""Responses to rewards."""

import importlib
import json
import linecache
import math
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.collection.scoring.classifiers import ClassifierReward
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.collection.scoring.responses import check_rows, score_rollouts
from hf_recontrol.collection.scoring.rewards import by_name, load_reward, named_rewards, text_reward
from hf_recontrol.collection.scoring.vader import vader
from hf_recontrol.collection.states import write_states
from hf_recontrol.data.prompts import Prompts, load_prompts
from hf_recontrol.data.rollouts import Rollout, load_rollouts, save_rollouts
from hf_recontrol.data.stage_folder import read_manifest
from hf_recontrol.data.states import StateStore

from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer


def rollouts(*completions: str, **columns) -> list[Rollout]:
    return [Rollout("w5", text, [5], [6], False, columns=dict(columns)) for text in completions]


@text_reward
def length(prompts, completions, **kwargs):
    return [len(text) for text in completions]


def test_each_function_is_one_objective():
    scored = score_rollouts(rollouts("a", "bcd"), length, lambda prompts, completions, **_: [0.5, -1])
    assert [r.reward for r in scored] == [[1.0, 0.5], [3.0, -1.0]]


def test_columns_reach_the_function_and_can_be_the_reward():
    seen = {}

    def reward(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts)
        return [0.0] * len(prompts)

    rows = rollouts("a", "b", score=0.25)
    score_rollouts(rows, reward)
    assert seen == {"score": [0.25, 0.25], "prompts": ["w5", "w5"], "completion_ids": [[6], [6]]}
    assert [r.reward for r in score_rollouts(rows, load_reward("column:score"))] == [[0.25], [0.25]]
    with pytest.raises(ValueError, match="no column 'absent'"):
        score_rollouts(rows, load_reward("column:absent"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, [], "1", 1j, 10**400, 1e300])
def test_a_reward_that_is_no_finite_number_is_named_with_its_row(bad):
    def broken(prompts, completions, **kwargs):
        return [0.0, bad]

    with pytest.raises(ValueError, match=r"row 1: the reward broken returned .*, expected a finite number"):
        score_rollouts(rollouts("a", "b"), broken)


def test_a_wrong_number_of_rewards_and_nothing_to_score_are_errors():
    with pytest.raises(ValueError, match="returned 1 values for 2"):
        score_rollouts(rollouts("a", "b"), lambda prompts, completions, **_: [1.0])
    with pytest.raises(ValueError, match="Nothing to score"):
        score_rollouts([], length)


def test_import_path_and_its_errors(tmp_path, monkeypatch):
    source = "def one(prompts, completions, **kwargs):\n    return [1.0 for _ in prompts]\n"
    (tmp_path / "my_rewards.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert score_rollouts(rollouts("a"), load_reward("my_rewards:one"))[0].reward == [1.0]
    with pytest.raises(ValueError, match="no function 'two'"):
        load_reward("my_rewards:two")
    with pytest.raises(ValueError, match="No module 'absent_module'"):
        load_reward("absent_module:one")
    with pytest.raises(OSError):
        load_reward(str(tmp_path / "no-model-here"))


def bert(num_labels: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config).eval()


def test_bools_numpy_and_one_element_tensors_are_numbers():
    values = [True, np.float32(0.5), np.int64(2), torch.tensor([3.0]), np.array([[4.0]])]
    scored = score_rollouts(rollouts("a", "b", "c", "d", "e"), lambda prompts, completions, **_: values)
    assert [r.reward for r in scored] == [[1.0], [0.5], [2.0], [3.0], [4.0]]


def test_columns_named_like_a_function_s_arguments_do_not_clash():
    row = replace(rollouts("a")[0], columns={"prompts": 1, "completions": 2, "topic": "x"})

    def topic(prompts, completions, topic, **columns):
        assert prompts == [row.prompt] and completions == ["a"] and columns == {"completion_ids": [[6]]}
        return [float(len(topic[0]))]

    assert score_rollouts([row], topic)[0].reward == [1.0]


@pytest.fixture
def folder(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    prompts = load_prompts([{"prompt": f"w{i}", "topic": i} for i in range(5, 15)])
    write_rollouts(tmp_path / "r", model, tiny_tokenizer(), prompts, max_new_tokens=4, part_size=4)
    return tmp_path / "r"


def test_a_folder_is_scored_in_place_and_scored_once(folder, monkeypatch):
    before = load_rollouts(folder)
    counts = label_rollouts(folder, {"length": length, "topic": load_reward("topic", {"topic"})})
    after = load_rollouts(folder)
    assert [replace(r, reward=None) for r in after] == before
    assert [r.reward for r in after] == [[float(len(r.completion)), float(r.columns["topic"])] for r in after]
    assert counts["unscored"] == 0 and counts["reward topic"] == sum(range(5, 15))
    assert read_manifest(folder, "rollouts", "")["rewards"] == ["length", "topic"]
    monkeypatch.setattr("hf_recontrol.collection.scoring.labels.scored_rollouts", None)
    assert label_rollouts(folder, {"length": length, "topic": load_reward("column:topic")}) == counts
    before = hashes(folder)
    with pytest.raises(ValueError, match=r"another reward \(there \['length', 'topic'\], now \['length'\]\).*--again"):
        label_rollouts(folder, [length])
    assert hashes(folder) == before


def hashes(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def edited(source: str, tmp_path, monkeypatch):
    """A reward from a module of its own, as a user's editor leaves it."""
    (tmp_path / "edited_reward.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_reward", raising=False)
    importlib.invalidate_caches()
    linecache.clearcache()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return load_reward("edited_reward:reward")


def test_an_edited_reward_of_the_same_name_is_noticed_and_can_replace_the_old_one(folder, tmp_path, monkeypatch):
    source = "def reward(prompts, completions, **columns):\n    return [{} for text in completions]\n"
    label_rollouts(folder, [edited(source.format("1.0"), tmp_path, monkeypatch)])
    changed = edited(source.format("2.0 + len(text)"), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"what it holds, or its weights are others now.*--again"):
        label_rollouts(folder, [changed])
    label_rollouts(folder, [changed], again=True)
    assert all(r.reward == [2.0 + len(r.completion)] for r in load_rollouts(folder))
    assert read_manifest(folder, "rollouts", "")["scoring"] == 1


def test_a_stopped_scoring_again_goes_on_and_mixes_nothing(folder):
    calls = []

    def failing(prompts, completions, **columns):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise ZeroDivisionError("once")
        return [-1.0] * len(prompts)

    label_rollouts(folder, [length])
    with pytest.raises(RuntimeError, match="once"):
        label_rollouts(folder, [failing], again=True)
    label_rollouts(folder, [failing])
    assert calls == [4, 4, 4, 2] and all(r.reward == [-1.0] for r in load_rollouts(folder))
    label_rollouts(folder, [failing], again=True)
    assert calls[4:] == [4, 4, 2], "what is finished is scored again when asked for"


def test_scoring_again_never_mixes_what_cannot_be_compared(folder, recontrol_warnings):
    class Client:
        __name__ = "client"

        def __init__(self, fails):
            self.lock, self.fails, self.calls = threading.Lock(), fails, 0

        def __call__(self, completions, **columns):
            self.calls += 1
            if self.fails and self.calls == 2:
                raise ZeroDivisionError("once")
            return [float(self.fails)] * len(completions)

    with pytest.raises(RuntimeError, match="once"):
        label_rollouts(folder, [Client(True)])
    with pytest.raises(ValueError, match="--again"):
        label_rollouts(folder, [Client(False)])
    label_rollouts(folder, [Client(False)], again=True)
    assert {r.reward[0] for r in load_rollouts(folder)} == {0.0}
    assert recontrol_warnings and all("cannot be known later" in said for said in recontrol_warnings)


def test_rollouts_whose_manifest_was_never_finished_are_named(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["parts"]
    path.write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(ValueError, match=r"not finished: run the same .*`recontrol rollout`, or `fit`"):
        label_rollouts(folder, [length])
    assert "rewards" not in json.loads(path.read_text()) or json.loads(path.read_text())["rewards"] is None


def test_a_classifier_with_other_weights_is_noticed(folder):
    model = bert(1)
    label_rollouts(folder, {"judge": ClassifierReward(model, tiny_tokenizer())})
    torch.nn.init.ones_(model.classifier.weight)
    with pytest.raises(ValueError, match=r"\['judge'\], but its code .* or its weights"):
        label_rollouts(folder, {"judge": ClassifierReward(model, tiny_tokenizer())})


def test_a_damaged_file_is_not_scored(folder):
    path = folder / "part-00001.parquet"
    save_rollouts(load_rollouts(path)[:2], path)
    with pytest.raises(ValueError, match=r"part-00001\.parquet was changed or damaged"):
        label_rollouts(folder, [length])


def test_columns_that_only_some_rows_have_are_none_elsewhere_in_every_file(tmp_path):
    prompts = load_prompts([{"prompt": f"w{i}", **({"topic": i} if i < 7 else {})} for i in range(5, 15)])
    write_rollouts(
        tmp_path, tiny_model("llama", dtype=torch.float32), tiny_tokenizer(), prompts, max_new_tokens=2, part_size=4
    )
    seen = []

    def reward(prompts, completions, topic, **columns):
        seen.extend(topic)
        return [0.0] * len(prompts)

    label_rollouts(tmp_path, [reward])
    assert seen == [5, 6] + [None] * 8


def test_a_failing_reward_leaves_the_folder_to_go_on_from(folder):
    calls = []

    def failing(prompts, completions, **columns):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise ZeroDivisionError("once")
        return length(prompts, completions)

    with pytest.raises(RuntimeError, match="failing failed: ZeroDivisionError: once"):
        label_rollouts(folder, [failing])
    with pytest.raises(ValueError, match=r"not scored to the end: run the same .*`recontrol label`, or `fit`"):
        load_rollouts(folder)
    label_rollouts(folder, [failing])
    assert calls == [4, 4, 4, 2], "the first file was not scored again"
    assert all(r.reward == [float(len(r.completion))] for r in load_rollouts(folder))


def test_a_folder_without_rollouts_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="No reward is given"):
        label_rollouts(tmp_path, [])
    with pytest.raises(OSError, match=r"holds no manifest\.json"):
        label_rollouts(tmp_path, [length])


def test_a_reward_that_changes_what_it_is_given_changes_nothing_else():
    def rude(prompts, completions, topic, **columns):
        prompts[0].append({"role": "assistant", "content": completions[0]})
        topic[0].append(9)
        completions.clear()
        return [1.0]

    prompt = [{"role": "user", "content": "w5"}]
    row = Rollout(prompt, "w6", [5], [6], False, columns={"topic": [1]})
    scored = score_rollouts([row], rude, length)[0]
    assert scored == replace(row, reward=[1.0, 2.0])
    assert scored.prompt == [{"role": "user", "content": "w5"}] and scored.columns == {"topic": [1]}


def test_rewards_can_be_changed_as_long_as_nothing_is_scored(folder):
    def broken(prompts, completions, **columns):
        return [float("nan")] * len(prompts)

    with pytest.raises(ValueError, match="broken returned nan"):
        label_rollouts(folder, [broken])
    label_rollouts(folder, [length])
    assert read_manifest(folder, "rollouts", "")["rewards"] == ["length"]


def only(kind: float):
    """A reward of one kind of prompts alone, as TRL routes them."""

    def reward(topic, completions):
        return [
            kind * len(text) if number % 2 == kind % 2 else None
            for number, text in zip(topic, completions, strict=True)
        ]

    reward.__name__ = f"only_{kind}"
    return reward


def test_routed_rewards_say_what_happened_and_make_one_reward_by_option(folder):
    routed = [only(1), only(2)]
    before = hashes(folder)
    message = (
        r"None of the 10 responses was scored by every reward \(only_1 scored 5, only_2 scored 5\).*"
        r"`combine_rewards='mean'` or 'sum' \(`--combine-rewards mean`\)"
    )
    with pytest.raises(ValueError, match=message):
        label_rollouts(folder, routed)
    assert hashes(folder).keys() == before.keys() and read_manifest(folder, "rollouts", "")["rewards"] is None
    with pytest.raises(ValueError, match="None of the 10 responses"):
        label_rollouts(folder, routed)
    counts = label_rollouts(folder, routed, combine_rewards="mean")
    expected = [[float((1 if r.columns["topic"] % 2 else 2) * len(r.completion))] for r in load_rollouts(folder)]
    assert [r.reward for r in load_rollouts(folder)] == expected
    assert (counts["unscored"], counts["scored only_1"], counts["scored only_2"]) == (0, 5, 5)
    assert counts["reward mean of only_1, only_2"] == sum(value for (value,) in expected)
    manifest = read_manifest(folder, "rollouts", "")
    assert manifest["rewards"] == ["mean of only_1, only_2"] and len(manifest["fingerprints"]) == 2
    assert label_rollouts(folder, routed, combine_rewards="mean") == counts
    with pytest.raises(ValueError, match="scored with another reward"):
        label_rollouts(folder, routed, combine_rewards="sum")
    assert write_states_of(folder).rewards.shape == (10, 1)


def write_states_of(folder):
    write_states(folder.parent / "states", tiny_model("llama", dtype=torch.float32), folder, directions=False)
    return StateStore.open(folder.parent / "states")


@pytest.mark.parametrize(("combine", "expected"), [("mean", [[2.0], [1.0], [2.0]]), ("sum", [[3.0], [1.0], [2.0]])])
def test_rewards_that_score_a_row_are_combined_and_one_that_none_scores_is_left_out(combine, expected, monkeypatch):
    def first(completions):
        return [1.0, 1.0, None, None]

    def second(completions):
        return [3.0 if combine == "mean" else 2.0, None, 2.0, None]

    warnings = []
    monkeypatch.setattr("hf_recontrol.collection.scoring.responses.logger.warning", warnings.append)
    scored = score_rollouts(rollouts("a", "b", "c", "d"), first, second, combine_rewards=combine)
    assert [r.reward for r in scored] == [*expected, None]
    assert warnings == ["1 of 4 responses have no reward and are left out (first scored 2, second scored 2)."]


def test_without_the_option_a_response_that_one_reward_does_not_score_is_left_out_and_counted(folder, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_recontrol.collection.scoring.labels.logger.warning", warnings.append)
    counts = label_rollouts(folder, [length, only(1)])
    assert counts["unscored"] == 5 and counts["scored length"] == 10
    assert warnings == ["5 of 10 responses have no reward and are left out (length scored 10, only_1 scored 5)."]
    assert write_states_of(folder).rewards.shape == (5, 2)


def test_a_bad_reward_is_not_replaced_by_another_that_scores_its_row(recontrol_warnings):
    def broken(completions):
        return [math.nan, 1.0]

    with pytest.raises(ValueError, match="row 0: the reward broken returned nan"):
        score_rollouts(rollouts("a", "b"), length, broken, combine_rewards="sum")
    scored = score_rollouts(rollouts("a", "b"), length, broken, combine_rewards="sum", on_bad_rows="skip")
    assert [r.reward for r in scored] == [None, [2.0]]


@pytest.mark.parametrize("combine", ["none", "mean"])
def test_a_reward_that_scores_nothing_is_named(combine):
    def nothing(completions):
        return [None for _ in completions]

    with pytest.raises(ValueError, match="nothing scored none of the 2 responses"):
        score_rollouts(rollouts("a", "b"), length, nothing, combine_rewards=combine)
    with pytest.raises(ValueError, match="must be one of 'none', 'mean', 'sum'"):
        score_rollouts(rollouts("a", "b"), length, combine_rewards="median")


def test_names_are_the_functions_own_however_they_are_given(tmp_path, monkeypatch):
    source = "from functools import partial\n\ndef one(completions):\n    return [1.0]\n\nhalf = partial(one)\n"
    for name in ("rewards_a", "rewards_b"):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    named = by_name([load_reward(spec, {"score"}) for spec in ("rewards_a:one", "column:score", "hf_recontrol:vader")])
    assert list(named) == ["one", "score", "vader"]
    assert list(by_name([load_reward("score", {"score"}), vader])) == ["score", "vader"]
    assert list(by_name([load_reward("rewards_a:half")])) == ["one"]
    both = by_name([load_reward("rewards_a:one"), load_reward("rewards_b:one")])
    assert list(both) == ["rewards_a:one", "rewards_b:one"]
    for same in (["score", "column:score"], ["rewards_a:one", "rewards_a:one"]):
        with pytest.raises(ValueError, match="Two rewards have the same name"):
            by_name([load_reward(spec, {"score"}) for spec in same])


def test_a_row_without_the_column_of_a_reward_is_named():
    prompts = Prompts([{"prompt": "w1", "score": 1.0}, {"prompt": "w2"}], [3, 7])
    rewards = named_rewards("score", prompts.columns)
    with pytest.raises(ValueError, match=r"prompt 7 \(the first is 0\): the column score holds None"):
        check_rows(rewards, prompts, "error")
    check_rows(rewards, prompts, "skip")


def test_a_folder_is_scored_by_rewards_as_all_else_takes_them(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_reward.py").write_text("def ones(completions, **_):\n    return [1.0] * len(completions)\n")
    for rewards, names in (
        (length, ["length"]),
        ("topic", ["topic"]),
        (["own_reward:ones", length], ["ones", "length"]),
    ):
        label_rollouts(folder, rewards, again=True)
        assert read_manifest(folder, "rollouts", "recontrol rollout")["rewards"] == names
    with pytest.raises(ValueError, match="functions or their names"):
        label_rollouts(folder, 3)
