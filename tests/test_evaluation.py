"""Metrics, and step sizes of equal KL."""

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM
from hf_recontrol.data.rollouts import Rollout
from hf_recontrol.evaluation.metrics import diversity, kl_divergence
from hf_recontrol.evaluation.strength import match_kl

from .conftest import make_head
from .tiny_models import tiny_model


def test_diversity_is_the_product_over_two_to_four_grams():
    # 5 words: 4, 3, 2 n-grams, all distinct.
    assert diversity(["a b c d e"]) == pytest.approx(4 / 5 * 3 / 4 * 2 / 3)
    # "a" eight times: one distinct n-gram among 7, 6 and 5.
    assert diversity(["a a a a a a a a"]) == pytest.approx(1 / 8 * 1 / 7 * 1 / 6)
    assert diversity(["a b c d e", "a a a a a a a a"]) == pytest.approx((0.4 + 1 / 336) / 2)
    assert diversity([""]) == 0.0
    with pytest.raises(ValueError, match="No texts"):
        diversity([])


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


@pytest.mark.parametrize("method", ["ascent", "advantage", "static"])
@pytest.mark.parametrize("start", [1e-3, 30.0])
def test_a_step_size_is_found_from_either_side(method, start):
    model = controlled(step_size=0.123)
    found = match_kl(model, some_rollouts(), ControlConfig(method, start, num_steps=4), 0.2)
    assert model.control.step_size == 0.123, "the model's own control is as it was"
    model.control = found
    assert kl_divergence(model, some_rollouts()) == pytest.approx(0.2, rel=0.12)


def test_a_kl_out_of_reach_is_an_error_and_leaves_the_control_as_it_was():
    model = controlled(step_size=0.5)
    with pytest.raises(ValueError, match="No strength was found"):
        match_kl(model, some_rollouts(), ControlConfig(step_size=1.0, num_steps=1), 1e3)
    with pytest.raises(ValueError, match="above 0"):
        match_kl(model, some_rollouts(), ControlConfig(), 0.0)
    for start in (0.0, (1.0, 2.0)):
        with pytest.raises(ValueError, match="one step size above 0"):
            match_kl(model, some_rollouts(), ControlConfig(step_size=start), 0.1)
    assert model.control.step_size == 0.5
