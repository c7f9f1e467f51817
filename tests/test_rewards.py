"""Responses to rewards."""

import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_recontrol.records import Rollout
from hf_recontrol.rewards import ClassifierReward, load_reward, score_rollouts

from .tiny_tokenizer import tiny_tokenizer


def rollouts(*completions: str, **columns) -> list[Rollout]:
    return [Rollout("w5", text, [5], [6], False, columns=dict(columns)) for text in completions]


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
    assert seen == {"score": [0.25, 0.25], "prompts": ["w5", "w5"]}
    assert [r.reward for r in score_rollouts(rows, load_reward("column:score"))] == [[0.25], [0.25]]
    with pytest.raises(ValueError, match="no column 'absent'"):
        score_rollouts(rows, load_reward("column:absent"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "1"])
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
        max_position_embeddings=12,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config).eval()


def test_a_classifier_scores_batches_as_single_texts_and_cuts_long_ones(tmp_path):
    tokenizer = tiny_tokenizer()
    bert(1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(str(tmp_path))
    completions = ["w5", "w6 w7 w8", " ".join(f"w{i}" for i in range(10, 40))]
    together = reward(["w9"] * 3, completions)
    alone = [reward(["w9"], [text])[0] for text in completions]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len(set(together)) == 3


def test_a_classifier_of_several_labels_needs_one_by_name(tmp_path):
    with pytest.raises(ValueError, match="`label` must be one of"):
        ClassifierReward(bert(3), tiny_tokenizer())
    model = bert(3)
    scores = [ClassifierReward(model, tiny_tokenizer(), label=f"LABEL_{i}")(["w5"], ["w6"])[0] for i in range(3)]
    expected = model(**tiny_tokenizer()(["w5"], ["w6"], return_tensors="pt")).logits[0]
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)
