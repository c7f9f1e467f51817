"""States to a head: targets, what training finds in data that hold something to find, and its errors."""

import math
from copy import deepcopy

import pytest
import torch

from hf_recontrol import ValueHeadConfig
from hf_recontrol.activations import States
from hf_recontrol.training import fit_advantage, split_by_prompt, td_targets, train_value_head, value_differences

WIDTH = 6


def naive_targets(values, reward, td_lambda):
    """The definition, one episode at a time."""
    targets = [reward]
    for t in reversed(range(len(values) - 1)):
        targets.insert(0, (1 - td_lambda) * values[t + 1] + td_lambda * targets[0])
    return targets


def naive_advantages(values, reward, gae_lambda):
    deltas = [after - before for before, after in zip(values, [*values[1:], reward], strict=True)]
    return [sum(gae_lambda**k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 0.95, 1.0])
def test_targets_of_ragged_episodes_are_those_of_the_definition(td_lambda):
    torch.manual_seed(0)
    lengths = torch.tensor([4, 1, 7, 3])
    values, rewards = torch.randn(4, 7, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    targets = td_targets(values, rewards, lengths, td_lambda)
    advantages = value_differences(values, rewards, lengths, td_lambda)
    for episode, length in enumerate(lengths):
        for objective in range(2):
            v, r = values[episode, :length, objective].tolist(), rewards[episode, objective].item()
            assert targets[episode, :length, objective].tolist() == pytest.approx(naive_targets(v, r, td_lambda))
            assert advantages[episode, :length, objective].tolist() == pytest.approx(naive_advantages(v, r, td_lambda))


def test_no_gradient_flows_through_targets():
    values = torch.randn(2, 3, 1, requires_grad=True)
    assert not td_targets(values, torch.zeros(2, 1), torch.tensor([3, 2]), 0.5).requires_grad


def episodes(count: int = 300, seed: int = 0, noise: float = 0.1, objectives: int = 1) -> States:
    """A walk whose end decides the reward; directions whose product with a fixed vector is the step in value."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.linspace(-1, 1, WIDTH)
    lengths = torch.randint(1, 9, (count,), generator=generator)
    hidden, rewards, directions = [], [], []
    for length in lengths.tolist():
        walk = torch.randn(length + 1, WIDTH, generator=generator).cumsum(0)
        hidden.append(walk[:-1])
        reward = walk[-1] @ slope
        rewards.append(torch.stack([reward * (1 + k) for k in range(objectives)]))
        directions.append(walk[1:] - walk[:-1])
    scale = torch.tensor([100.0, 1, 1, 1, 1, 0.01])
    rewards = torch.stack(rewards)
    rewards = 7 + 3 * (rewards + noise * torch.randn(rewards.shape, generator=generator))
    return States(
        hidden=5 + torch.cat(hidden) * scale,
        lengths=lengths,
        rewards=rewards,
        prompts=torch.arange(count) // 2,
        directions=torch.cat(directions),
    )


CONFIG = ValueHeadConfig(WIDTH, head_sizes=[32], hook_point="lm_head", advantage_sizes=[16])
FAST = {"num_epochs": 20, "learning_rate": 3e-3, "batch_size": 32}


@pytest.mark.parametrize("td_lambda", [0.0, 0.95, 1.0])
def test_a_head_learns_to_predict_the_reward_in_its_own_units(td_lambda):
    states = episodes()
    head, figures = train_value_head(states, CONFIG, td_lambda=td_lambda, **FAST)
    assert figures["value_error"] < 0.6
    assert figures["correlation_last"] > figures["correlation_first"] > 0.3
    assert head.config.reward_mean == pytest.approx(7, abs=2) and head.config.reward_std > 3
    last = states.lengths.cumsum(0) - 1
    predicted = head.rewards(head(states.hidden[last])).detach()
    assert float((predicted - states.rewards).square().mean()) < 0.5 * float(states.rewards.var())


def test_features_of_unlike_scale_need_the_scaling():
    states = episodes()
    scaled = train_value_head(states, CONFIG, **FAST)[1]["value_error"]
    raw = train_value_head(states, CONFIG, scaling="none", **FAST)
    assert scaled < raw[1]["value_error"]
    assert torch.equal(raw[0].state_scale, torch.ones(WIDTH)) and torch.equal(raw[0].state_mean, torch.zeros(WIDTH))
    one_scale = train_value_head(states, CONFIG, scaling="scalar", num_epochs=1)[0].state_scale
    assert len(one_scale.unique()) == 1


def test_the_same_seed_gives_the_same_head_and_leaves_the_global_generator_alone():
    states = episodes(60)
    before = torch.get_rng_state()
    first = train_value_head(states, CONFIG, num_epochs=2)[0].state_dict()
    assert torch.equal(before, torch.get_rng_state())
    second = train_value_head(states, CONFIG, num_epochs=2)[0].state_dict()
    other = train_value_head(states, CONFIG, num_epochs=2, seed=1)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_best_epoch_is_kept():
    states = episodes(80, noise=2.0)
    errors = [train_value_head(states, CONFIG, num_epochs=n, learning_rate=1e-2)[1]["value_error"] for n in (1, 5, 40)]
    assert errors == sorted(errors, reverse=True)


def test_several_objectives_have_their_own_units():
    head, figures = train_value_head(
        episodes(objectives=2), ValueHeadConfig(WIDTH, head_sizes=[32], hook_point="lm_head", num_objectives=2), **FAST
    )
    assert len(head.config.reward_mean) == 2
    assert head.config.reward_std[1] == pytest.approx(2 * head.config.reward_std[0], rel=0.1)
    assert figures["correlation_last"] > 0.5


def test_no_prompt_is_on_both_sides_of_the_split():
    states = episodes(40)
    train, held_out = split_by_prompt(states, 0.2, seed=0)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(40))
    assert not set(states.prompts[train].tolist()) & set(states.prompts[held_out].tolist())
    assert len(held_out) == 8


def test_the_constant_part_is_ridge_regression_in_closed_form():
    states = episodes(noise=0.0)
    head, _ = train_value_head(states, CONFIG, td_lambda=1.0, **FAST)
    figures = fit_advantage(head, states, num_epochs=0)
    assert figures["constant_correlation"] == figures["advantage_correlation"] > 0.5
    weight, bias = head.advantage_mlp.layers[-1].weight, head.advantage_mlp.layers[-1].bias
    assert not weight.any()
    # The step in value is the direction's product with the slope, in standardised units.
    slope = torch.linspace(-1, 1, WIDTH) * 3 / head.config.reward_std
    assert torch.cosine_similarity(bias, slope, dim=0) > 0.95


def test_the_advantage_part_is_never_worse_on_held_out_prompts_than_its_constant_part():
    states = episodes(noise=1.0)
    head, _ = train_value_head(states, CONFIG, **FAST)
    figures = fit_advantage(head, states, learning_rate=3e-3, num_epochs=5)
    assert figures["advantage_correlation"] >= figures["constant_correlation"] - 1e-3
    assert all(math.isfinite(value) for value in figures.values())


def test_the_mlp_of_the_advantage_part_learns_what_a_constant_cannot_say():
    """What a direction is worth turns its sign with the state, so no constant vector can tell."""
    generator = torch.Generator().manual_seed(0)
    count, length = 600, 4
    sign = torch.randint(0, 2, (count, 1, 1), generator=generator) * 2.0 - 1
    directions = torch.randn(count, length, WIDTH, generator=generator)
    value = (sign * directions)[..., 0].cumsum(1)
    # The state holds the value so far and the sign, so that V can be exact.
    hidden = torch.zeros(count, length, WIDTH)
    hidden[:, 1:, 1] = value[:, :-1]
    hidden[:, :, 2:3] = sign
    states = States(
        hidden=hidden.flatten(0, 1),
        lengths=torch.full((count,), length),
        rewards=value[:, -1:],
        prompts=torch.arange(count),
        directions=directions.flatten(0, 1),
    )
    head, _ = train_value_head(states, CONFIG, td_lambda=1.0, **FAST)
    figures = fit_advantage(head, states, learning_rate=1e-2, num_epochs=20)
    assert figures["advantage_correlation"] > figures["constant_correlation"] + 0.3
    smoothed = deepcopy(head)
    fit_advantage(smoothed, states, learning_rate=1e-2, num_epochs=1, gae_lambda=0.9)
    assert not torch.equal(smoothed.advantage(hidden[0]), head.advantage(hidden[0]))


def change(states: States, **changes) -> States:
    return States(**(vars(states) | changes))


@pytest.mark.parametrize(
    ("make", "kwargs", "error"),
    [
        (lambda s: change(s, rewards=torch.ones_like(s.rewards)), {}, "All rewards are equal"),
        (lambda s: change(s, rewards=s.rewards * math.nan), {}, "rewards hold NaN"),
        (lambda s: change(s, hidden=s.hidden * math.inf), {}, "states hold NaN"),
        (lambda s: change(s, hidden=s.hidden[:, :3]), {}, "3 wide"),
        (lambda s: change(s, rewards=s.rewards.expand(-1, 2)), {}, "2 rewards"),
        (lambda s: change(s, prompts=torch.zeros_like(s.prompts)), {}, "cannot be split"),
        (lambda s: change(s, hook_point="decoder_layer"), {}, "were read at"),
        (lambda s: s, {"td_lambda": 1.5}, "td_lambda"),
        (lambda s: s, {"scaling": "other"}, "scaling"),
        (lambda s: s, {"learning_rate": 1e30}, "diverged"),
    ],
)
def test_data_and_settings_that_cannot_work_are_errors(make, kwargs, error):
    with pytest.raises(ValueError, match=error):
        train_value_head(make(episodes(20)), CONFIG, **({"num_epochs": 2} | kwargs))


def test_an_advantage_part_needs_one_and_directions():
    states = episodes(20)
    head, _ = train_value_head(states, CONFIG, num_epochs=1)
    with pytest.raises(ValueError, match="no directions"):
        fit_advantage(head, change(states, directions=None))
    plain, _ = train_value_head(states, ValueHeadConfig(WIDTH, hook_point="lm_head"), num_epochs=1)
    with pytest.raises(ValueError, match="no advantage part"):
        fit_advantage(plain, states)
