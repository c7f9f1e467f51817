"""TD(λ) and GAE(λ) targets over ragged episodes against their definitions."""

from itertools import pairwise

import pytest
import torch

from hf_recontrol.training.targets import pad_episodes, td_targets, value_differences


def naive_targets(values, reward, td_lambda, discount, open_ended):
    """The definition, one episode at a time."""
    targets = [values[-1] if open_ended else reward]
    for t in reversed(range(len(values) - 1)):
        targets.insert(0, discount * ((1 - td_lambda) * values[t + 1] + td_lambda * targets[0]))
    return targets


def naive_advantages(values, reward, gae_lambda, discount, open_ended):
    deltas = [discount * after - before for before, after in pairwise(values)]
    deltas.append(0.0 if open_ended else reward - values[-1])
    decay = discount * gae_lambda
    return [sum(decay**k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 0.95, 1.0])
def test_targets_of_ragged_episodes_are_those_of_the_definition(td_lambda, discount):
    torch.manual_seed(0)
    lengths = torch.tensor([4, 1, 13, 3, 8])
    open_ended = torch.tensor([False, True, False, True, True])
    values, rewards = torch.randn(5, 13, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    options = {"discount": discount, "open_ended": open_ended}
    targets = td_targets(values, rewards, lengths, td_lambda, **options)
    advantages = value_differences(values, rewards, lengths, td_lambda, **options)
    for episode, length in enumerate(lengths):
        for objective in range(2):
            v, r = values[episode, :length, objective].tolist(), rewards[episode, objective].item()
            known = (v, r, td_lambda, discount, bool(open_ended[episode]))
            assert targets[episode, :length, objective].tolist() == pytest.approx(naive_targets(*known))
            assert advantages[episode, :length, objective].tolist() == pytest.approx(naive_advantages(*known))
        assert not targets[episode, length:].any() and not advantages[episode, length:].any()


def test_open_episodes_do_not_use_their_reward():
    values, lengths = torch.randn(2, 4, 1), torch.tensor([4, 3])
    options = {"open_ended": torch.tensor([True, False])}
    one, other = (td_targets(values, torch.tensor([[r], [1.0]]), lengths, 0.9, **options) for r in (0.0, 100.0))
    assert torch.equal(one, other)


def test_no_gradient_flows_through_targets():
    values = torch.randn(2, 3, 1, requires_grad=True)
    assert not td_targets(values, torch.zeros(2, 1), torch.tensor([3, 2]), 0.5).requires_grad
    assert not value_differences(values, torch.zeros(2, 1), torch.tensor([3, 2]), 0.5).requires_grad


def test_a_long_episode_keeps_its_precision():
    """Ten thousand tokens at λ=1: the target is the reward everywhere, exactly."""
    values = torch.randn(1, 10_000, 1)
    targets = td_targets(values, torch.tensor([[0.7]]), torch.tensor([10_000]), 1.0)
    assert torch.equal(targets, torch.full_like(targets, 0.7))


def test_padding_puts_each_episode_in_its_row():
    padded = pad_episodes(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2]))
    assert padded[..., 0].tolist() == [[1, 0], [2, 3]]
