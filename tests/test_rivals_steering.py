"""Policies that are no control of a head: how far they are from the base, and the static steering vector."""

from contextlib import contextmanager

import pytest
import torch

from hf_recontrol.data.rollouts import Rollout
from hf_recontrol.evaluation.likelihoods import likelihoods

from .tiny_models import layers_of, tiny_model


def rollouts_of(*pairs):
    return [
        Rollout("asked", "said", prompt_ids, completion_ids, False, prompt_number=number)
        for number, (prompt_ids, completion_ids) in enumerate(pairs)
    ]


@contextmanager
def shifted(layer, vector):
    """A layer whose output is shifted, inside the block."""

    def shift(module, args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    with layer.register_forward_hook(shift):
        yield


def test_the_base_is_read_outside_of_the_policy():
    model = tiny_model("llama")
    vector = torch.randn(16, dtype=torch.float64)
    rollouts = rollouts_of(([5, 6, 7], [8, 9]), ([11, 12], [13, 14, 15]))
    found = likelihoods(model, rollouts, lambda: shifted(layers_of(model)[1], vector), batch_size=2)
    for rollout, likelihood in zip(rollouts, found, strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        own = slice(len(rollout.prompt_ids) - 1, -1)
        with torch.no_grad():
            base = torch.log_softmax(model(ids).logits[0, own].float(), -1)
            with shifted(layers_of(model)[1], vector):
                policy = torch.log_softmax(model(ids).logits[0, own].float(), -1)
        tokens = torch.tensor(rollout.completion_ids)[:, None]
        assert likelihood.base == pytest.approx(float(-base.gather(-1, tokens).sum()), rel=1e-5)
        assert likelihood.kl == pytest.approx(float((policy.exp() * (policy - base)).sum()), rel=1e-4)
        assert likelihood.kl > 0.01
