"""Metrics, and step sizes of equal KL."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM, SamplingSettings, generate_rollouts
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import Rollout
from hf_recontrol.evaluation import strength
from hf_recontrol.evaluation.metrics import diversity, kl_divergence
from hf_recontrol.evaluation.strength import kl_with_interval, match_kl

from .conftest import make_head
from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer


def test_diversity_is_the_product_over_two_to_four_grams():
    # 5 words: 4, 3, 2 n-grams, all distinct.
    assert diversity(["a b c d e"]) == pytest.approx(4 / 5 * 3 / 4 * 2 / 3)
    # "a" eight times: one distinct n-gram among 7, 6 and 5.
    assert diversity(["a a a a a a a a"]) == pytest.approx(1 / 8 * 1 / 7 * 1 / 6)
    assert diversity(["a b c d e", "a a a a a a a a"]) == pytest.approx((0.4 + 1 / 336) / 2)
    assert diversity([""]) == 0.0
    with pytest.raises(ValueError, match="No texts"):
        diversity([])
    with pytest.raises(TypeError, match=r"`diversity\(\[text\]\)`"):
        diversity("a b c d e")


def some_rollouts() -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (4, 9, 6)]
    return [Rollout("w5", "", row[: k + 1], row[k + 1 :], False) for k, row in enumerate(ids)]


def controlled(**kwargs):
    head = make_head(hidden_size=16, hook_point="lm_head", advantage_sizes=[8], static_vector=True)
    return ReControlForCausalLM.from_model(tiny_model("llama"), head, ControlConfig(**kwargs))


@pytest.mark.parametrize("plausibility", [0.0, 0.3])
def test_kl_is_the_mean_over_response_tokens_whatever_the_batch(plausibility):
    model = controlled(step_size=1.0, num_steps=5, plausibility=plausibility)
    total, count = 0.0, 0
    for rollout in some_rollouts():
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        part = slice(len(rollout.prompt_ids) - 1, -1)
        with torch.no_grad():
            policy = torch.softmax(model(ids).logits[0, part], -1)
            with model.disable_control():
                base = torch.softmax(model(ids).logits[0, part], -1)
        total += float(torch.special.xlogy(policy, policy / base).sum())
        count += len(rollout.completion_ids)
    assert total / count > 0.01
    for batch_size in (1, 2, 8):
        kl = kl_divergence(model, some_rollouts(), batch_size=batch_size)
        assert kl == pytest.approx(total / count, rel=1e-4)
    with pytest.raises(ValueError, match="No rollout"):
        kl_divergence(model, [Rollout("w5", "", [5], [], False)])


def test_control_that_does_nothing_has_no_kl():
    assert kl_divergence(controlled(step_size=0.0), some_rollouts()) == 0.0


PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 69)]
SAMPLING = SamplingSettings(max_new_tokens=6, temperature=0.7, batch_size=32, seed=3)


@pytest.mark.parametrize("method", ["ascent", "advantage", "static"])
@pytest.mark.parametrize("start", [1e-3, 30.0])
def test_a_step_size_is_found_from_either_side_on_the_controls_own_responses(method, start):
    model = controlled(step_size=0.123)
    found = match_kl(model, tiny_tokenizer(), PROMPTS, ControlConfig(method, start, num_steps=4), 0.2, SAMPLING)
    assert model.control.step_size == 0.123, "the model's own control is as it was"
    own = generate_rollouts(model, tiny_tokenizer(), PROMPTS, SAMPLING, control=found.control)
    model.control = found.control
    assert kl_divergence(model, own) == pytest.approx(found.kl, rel=1e-5)
    assert found.kl == pytest.approx(0.2, rel=0.1) and found.low < found.kl < found.high
    assert (found.prompts, found.responses) == (64, 64)


@pytest.mark.parametrize("kind", ["file", "columns"])
def test_prompts_to_find_a_strength_on_may_come_as_everywhere_else(kind, tmp_path):
    given = {"prompt": PROMPTS}
    if kind == "file":
        given = tmp_path / "prompts.jsonl"
        given.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    model, start = controlled(), ControlConfig("static", 1.0)
    of_texts, found = (match_kl(model, tiny_tokenizer(), each, start, 0.2, SAMPLING) for each in (PROMPTS, given))
    assert found == of_texts


def test_the_interval_of_a_kl_is_over_prompts():
    asked = {7: "w5", 8: "w6"}
    rollouts = [replace(r, prompt=asked[n], prompt_number=n) for n in asked for r in some_rollouts()]
    nats = [3.0, 8.0, 5.0, 6.0, 16.0, 10.0]
    kl, low, high = kl_with_interval(rollouts, nats)
    tokens = sum(len(rollout.completion_ids) for rollout in some_rollouts())
    # Both prompts, or one of them twice.
    assert (kl, low, high) == pytest.approx((24 / tokens, 16 / tokens, 32 / tokens))
    assert kl_with_interval(some_rollouts()[:1], [1.0])[1:] == (-math.inf, math.inf)
    # Equal prompts tell no more than one, whatever their numbers.
    assert kl_with_interval([replace(r, prompt="w5") for r in rollouts], nats)[1:] == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="No response has a token"):
        kl_with_interval([replace(some_rollouts()[0], completion_ids=[])], [0.0])


def test_of_few_prompts_each_is_answered_several_times_and_a_warning_says_so(recontrol_warnings):
    found = match_kl(controlled(), tiny_tokenizer(), PROMPTS[:20], ControlConfig("static", 1.0), 0.2, SAMPLING)
    assert (found.prompts, found.responses) == (20, 80)
    assert [message for message in recontrol_warnings if "measured on 20 prompts" in message]


def test_a_kl_out_of_reach_is_an_error_and_leaves_the_control_as_it_was():
    model = controlled(step_size=0.5)
    start = ControlConfig(step_size=1.0, num_steps=1)
    with pytest.raises(ValueError, match="No strength was found"):
        match_kl(model, tiny_tokenizer(), PROMPTS, start, 1e3, SAMPLING)
    with pytest.raises(ValueError, match="above 0"):
        match_kl(model, tiny_tokenizer(), PROMPTS, start, 0.0, SAMPLING)
    with pytest.raises(ValueError, match="No prompts"):
        match_kl(model, tiny_tokenizer(), [], start, 0.1, SAMPLING)
    with pytest.raises(ValueError, match="No prompts"):
        match_kl(model, tiny_tokenizer(), load_prompts(PROMPTS).take([]), start, 0.1, SAMPLING)
    for bad in (0.0, (1.0, 2.0)):
        with pytest.raises(ValueError, match="one step size above 0"):
            match_kl(model, tiny_tokenizer(), PROMPTS, ControlConfig(step_size=bad), 0.1, SAMPLING)
    assert model.control.step_size == 0.5


def test_what_has_no_such_control_is_told_before_anything_is_drawn(monkeypatch):
    monkeypatch.setattr(strength, "draw_rollouts", None)
    base, start = tiny_model("llama"), ControlConfig("advantage", 1.0)
    with pytest.raises(TypeError, match="must be a controlled model, got LlamaForCausalLM"):
        match_kl(base, tiny_tokenizer(), PROMPTS, start, 0.1, SAMPLING)
    with pytest.raises(TypeError, match="must be a controlled model, got LlamaForCausalLM"):
        kl_divergence(base, some_rollouts())
    model = ReControlForCausalLM.from_model(base, make_head(hidden_size=16, hook_point="lm_head"))
    with pytest.raises(ValueError, match="needs a head with an advantage part"):
        match_kl(model, tiny_tokenizer(), PROMPTS, start, 0.1, SAMPLING)
