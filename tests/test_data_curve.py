"""What more rollouts would be worth."""

import pytest
import torch

from hf_recontrol import data_curve
from hf_recontrol.data.states import States

HIDDEN, TOKENS = 6, 12


def episodes(count, signal, seed=0, length=1, per_prompt=2):
    """
    Responses of tokens that are drawn from one distribution, whatever came before. The reward of one: what its tokens
    are worth, and noise. Also what is needed to say what a control earns: LM head, distribution, worth of each token.
    """
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    state = torch.ones(HIDDEN, dtype=torch.float64) / 4
    probabilities = torch.softmax(head @ state, 0)
    worth = head @ torch.linspace(-1, 1, HIDDEN, dtype=torch.float64)
    tokens = torch.multinomial(probabilities, count * length, replacement=True, generator=generator).view(
        count, length
    )
    rewards = signal * worth[tokens].sum(1) + torch.randn(count, generator=generator, dtype=torch.float64)
    states = States(
        # A little noise, or a V with a constant would be the same thing twice.
        hidden=state + 1e-3 * torch.randn(count * length, HIDDEN, generator=generator, dtype=torch.float64),
        directions=(head - probabilities @ head)[tokens.flatten()],
        lengths=torch.full((count,), length),
        rewards=rewards[:, None],
        prompts=torch.arange(count) // per_prompt,
    )
    return states, head, probabilities, worth


def earned(head, probabilities, worth, vector, signal, length, noise=1.0):
    """What the control earns for the root of a nat a response, in the reward's deviations, at a small step size."""
    policy = torch.softmax(probabilities.log() + 1e-3 * head @ vector, 0)
    kl = (policy * (policy / probabilities).log()).sum() * length
    variance = signal**2 * length * ((probabilities * worth**2).sum() - (probabilities * worth).sum() ** 2) + noise
    return float(signal * length * ((policy - probabilities) * worth).sum() / variance.sqrt() / kl.sqrt())


@pytest.mark.parametrize("length", [1, 4])
def test_the_gain_is_what_the_policy_earns_for_a_small_kl(length):
    states, head, probabilities, worth = episodes(20_000, 0.5, length=length)
    curve = data_curve(states)
    # Of so many responses the vector found is the true one, in the directions that any token has.
    truth = torch.linspace(-1, 1, HIDDEN, dtype=torch.float64)
    expected = earned(head, probabilities, worth, truth, 0.5, length)
    # Its standard error is a hundredth.
    assert curve.gain[-1] == pytest.approx(expected, abs=0.03)
    assert curve.responses == [4000, 8000, 16000]
    assert abs(curve.doubling[0]) < 0.02 and curve.doubling[0] == pytest.approx(curve.gain[-1] - curve.gain[-2])


def test_few_responses_say_that_more_would_help_and_noise_says_that_nothing_is_known():
    assert data_curve(episodes(400, 0.15, length=4)[0]).doubling[0] > 0
    many = [data_curve(episodes(400, 0.0, seed=seed, length=4)[0]) for seed in range(20)]
    assert sum(curve.more_would_help for curve in many) <= 3, "2.5 % of them by chance"


@pytest.mark.parametrize("share", [3, 4, 8])
def test_of_many_states_the_moments_are_of_some(monkeypatch, share):
    states = episodes(2000, 0.3, length=8)[0]
    exact = data_curve(states)
    # Also where one in as many states is read as a response has.
    monkeypatch.setattr("hf_recontrol.evaluation.data_curve._STATES_FOR_MOMENTS", 16_000 // share)
    some = data_curve(states)
    assert some.gain != exact.gain and some.gain == pytest.approx(exact.gain, abs=0.03)
    assert some.doubling == pytest.approx(exact.doubling, abs=0.01)


def test_what_is_read_at_once_changes_nothing(monkeypatch):
    states = episodes(400, 0.3, length=4)[0]
    whole = data_curve(states)
    monkeypatch.setattr("hf_recontrol.evaluation.data_curve._BATCH", 50 * HIDDEN)
    assert data_curve(states).gain == pytest.approx(whole.gain)


def test_responses_of_one_prompt_count_together():
    states = episodes(600, 0.1)[0]
    apart = data_curve(states).doubling
    names = ("hidden", "directions", "lengths", "rewards", "prompts")
    twice = data_curve(States(**{name: getattr(states, name).repeat_interleave(2, 0) for name in names})).doubling
    assert twice[0] == pytest.approx(apart[0], abs=1e-3)
    assert twice[2] - twice[0] == pytest.approx(apart[2] - apart[0], rel=1e-2)


def test_a_prompt_that_has_most_responses_does_not_make_them_certain():
    states = episodes(600, 0.1)[0]
    even = data_curve(states).doubling
    mostly_one = torch.arange(600).clamp_max(120)
    one = data_curve(States(**(vars(states) | {"prompts": mostly_one}))).doubling
    assert one[2] - one[1] > 1.5 * (even[2] - even[1])


def test_objectives_count_as_their_sum():
    states = episodes(600, 0.3)[0]
    both = States(**(vars(states) | {"rewards": states.rewards.repeat(1, 2) * torch.tensor([1.0, 50.0]) + 3}))
    assert data_curve(both).gain == pytest.approx(data_curve(states).gain)


def test_what_gives_no_curve_is_named():
    states = episodes(400, 0.3)[0]
    with pytest.raises(ValueError, match="needs directions"):
        data_curve(States(**(vars(states) | {"directions": None})))
    with pytest.raises(ValueError, match="every=1"):
        data_curve(States(**(vars(states) | {"every": 2})))
    with pytest.raises(ValueError, match="50 prompts or more, there are 20"):
        data_curve(episodes(40, 0.3)[0])
    equal = States(**(vars(states) | {"rewards": torch.ones(400, 1)}))
    assert data_curve(equal).gain == [0, 0, 0], "rewards that do not differ"
    certain = States(**(vars(states) | {"directions": 0 * states.directions}))
    assert data_curve(certain).gain == [0, 0, 0], "a policy that knows one token alone"
    unknown = States(
        **(vars(states) | {"rewards": states.rewards.clone().index_fill(0, torch.tensor([3]), torch.nan)})
    )
    with pytest.raises(ValueError, match="a finite reward"):
        data_curve(unknown)
