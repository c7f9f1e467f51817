"""Figures of a comparison against hand-worked cases, brute force, simulations, and other people's implementations."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM, Rollout, generate_rollouts, kl_divergence
from hf_recontrol.collection import batches as response_batches
from hf_recontrol.evaluation.comparison import figures as comparison_figures
from hf_recontrol.evaluation.comparison.figures import METRICS, Sample, best_of, figures_of, sample_of
from hf_recontrol.evaluation.comparison.plots import write_plots
from hf_recontrol.evaluation.comparison.scores import best_places, coherence_scorer, matched_references, wins
from hf_recontrol.evaluation.comparison.table import table
from hf_recontrol.evaluation.intervals import NUM_RESAMPLES, paired_interval, ratio_interval, resamples
from hf_recontrol.evaluation.likelihoods import likelihoods
from hf_recontrol.evaluation.metrics import knows_units, repetition
from hf_recontrol.evaluation.rivals.plain import best_of_n_kl, best_of_n_weights
from hf_recontrol.evaluation.rivals.rival import standardised

from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer


def sample(name="x", rewards=(), prompts=None, weights=None, strength=None, **values):
    rewards = np.array([math.nan if r is None else r for r in rewards], float)
    prompts = np.arange(len(rewards)) if prompts is None else np.array(prompts)
    values = {key: np.array(each, float) for key, each in values.items()}
    filler = {key: np.ones(len(rewards)) for key in ("kl", "base", "length", "seconds")}
    weights = np.ones(len(rewards)) if weights is None else np.array(weights, float)
    return Sample(name, strength, prompts, weights, filler | {"reward": rewards} | values)


def figure(metric, samples, against, count):
    [found] = [
        f for f in figures_of(samples, against, count) if f.control == samples[0].control and f.metric == metric
    ]
    return found


# Intervals.


def test_intervals_of_a_mean_are_those_of_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).exponential(size=60)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    )
    low, high = paired_interval(values)
    width = high - low
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.06 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.06 * width)


def test_an_interval_is_the_quantiles_over_the_resamples_themselves():
    values = np.random.default_rng(0).normal(size=9)
    chosen = torch.randint(9, (NUM_RESAMPLES, 9), generator=torch.Generator().manual_seed(0)).numpy()
    expected = np.quantile(values[chosen].mean(1), [0.025, 0.975])
    np.testing.assert_allclose(paired_interval(values), expected, rtol=1e-12)
    assert (resamples(9).sum(1) == 9).all()


def test_an_interval_of_a_ratio_is_that_of_scipy():
    rng = np.random.default_rng(3)
    below = rng.integers(1, 60, size=80).astype(float)
    above = 0.1 * below + rng.normal(size=80)
    expected = scipy.stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    low, high = ratio_interval(above, below)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.06 * (high - low))


def test_of_a_hundred_intervals_some_95_hold_the_truth():
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        base = rng.normal(size=50)
        better = base + 0.3 + 0.5 * rng.normal(size=50)
        found = figure("reward", [sample("a", better)], sample("b", base), 50)
        held += found.difference_low <= 0.3 <= found.difference_high
    assert 0.90 <= held / 300 <= 0.98


def test_differences_are_paired():
    """What prompts have in common cancels: the difference is known far better than either mean."""
    rng = np.random.default_rng(6)
    base = 10 * rng.normal(size=100)
    found = figure("reward", [sample("a", base + 1 + 0.1 * rng.normal(size=100))], sample("b", base), 100)
    assert found.difference == pytest.approx(1, abs=0.05)
    assert found.difference_high - found.difference_low < 0.1 < 2 < found.high - found.low


def test_answers_without_a_number_are_left_out_and_differences_are_over_shared_prompts():
    a, b = sample("a", [1.0, None, 3.0, 7.0]), sample("b", [0.0, 5.0, None, 1.0])
    found = figure("reward", [a], b, 4)
    assert (found.value, found.count) == (pytest.approx(11 / 3), 3)
    assert found.difference == pytest.approx((1 - 0 + 7 - 1) / 2)
    worst = figure("reward_worst_tenth", [a], b, 4)
    assert (worst.value, worst.count, worst.difference) == (1, 3, 1)


def test_prompts_count_alike_however_many_of_their_answers_have_a_number():
    found = figure("reward", [sample("a", [0.0, 2.0, 5.0, None], [0, 0, 1, 1])], sample("b", [0.0] * 2), 2)
    assert found.value == 3
    assert found.count == 2


def test_of_one_prompt_nothing_is_known():
    found = figure("reward", [sample("a", [1.0])], sample("b", [0.0]), 1)
    assert (found.low, found.high, found.difference_low, found.difference_high) == (
        -math.inf,
        math.inf,
        -math.inf,
        math.inf,
    )
    assert "?" in table([found], "b", 1)


# Best of n.


@pytest.mark.parametrize("rewards", [[0.3, -1.0, 2.0, 0.7, 0.1], [1.0, 1.0, 0.0, 1.0, 2.0], [0.0] * 4])
def test_weights_of_the_best_of_n_are_the_share_of_subsets_that_each_is_best_in(rewards):
    for n in range(1, len(rewards) + 1):
        expected = np.zeros(len(rewards))
        subsets = list(itertools.combinations(range(len(rewards)), n))
        for subset in subsets:
            best = [i for i in subset if rewards[i] == max(rewards[j] for j in subset)]
            expected[best] += 1 / len(best) / len(subsets)
        # Of one reward all share alike.
        for value in set(rewards):
            alike = np.array(rewards) == value
            expected[alike] = expected[alike].mean()
        np.testing.assert_allclose(best_of_n_weights(rewards, n), expected, atol=1e-12)


def test_the_best_of_n_is_estimated_without_bias():
    rng = np.random.default_rng(0)
    pools = rng.normal(size=(4000, 4))
    of_two = np.mean([best_of_n_weights(pool, 2) @ pool for pool in pools])
    assert of_two == pytest.approx(1 / math.sqrt(math.pi), abs=0.03)  # E max of two standard normals


def test_the_kl_of_the_best_of_n_is_what_enumeration_gives_as_responses_become_unlikely():
    count, n = 4000, 4
    ranks = np.arange(1, count + 1) / count
    chosen = ranks**n - (ranks - 1 / count) ** n
    exact = float((chosen * np.log(chosen * count)).sum())
    assert exact <= best_of_n_kl(n)
    assert best_of_n_kl(n) == pytest.approx(exact, abs=2e-3)
    assert best_of_n_kl(1) == 0


def test_the_best_of_n_of_a_pool_costs_n_answers_and_never_takes_one_without_a_reward():
    kl = [best_of_n_kl(4)] * 4
    pool = sample("p", [0.0, None, 2.0, 1.0], [0] * 4, kl=kl, seconds=[0.5] * 4, length=[10, 20, 30, 40])
    four, one = best_of(pool, 4), best_of(pool, 1)
    assert four.weights.tolist() == [0, 0, 1, 0]
    value = {f.metric: f.value for f in figures_of([four], sample("b", [0.0]), 1)}
    assert value["reward"] == 2 and value["length"] == 30
    assert value["seconds"] == 2 and value["tokens_per_second"] == pytest.approx(30 / 2)
    assert value["kl_per_response"] == pytest.approx(math.log(4) - 3 / 4)
    assert value["kl_per_token"] == pytest.approx((math.log(4) - 3 / 4) / 30)
    value = {f.metric: f.value for f in figures_of([one], sample("b", [0.0]), 1)}
    assert value["reward"] == 1 and value["length"] == 25
    assert value["kl_per_response"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_what_a_judge_refuses_pulls_no_best_of_n_towards_a_tie(n):
    """The first answer of each pool is the base's own: it ties without a verdict."""
    against = sample("b", [0.0] * 3, win_rate=[0.5] * 3, ties=[1] * 3)
    prompts, rewards = np.repeat(range(3), 3), [0.0, 1.0, 2.0, 2.0, 1.0, 0.0, 3.0, 2.0, 4.0]
    refused = [0.5, math.nan, math.nan] * 3
    pool = best_of(sample("p", rewards, prompts, win_rate=refused, ties=refused), n)
    assert not {"win_rate", "ties"} & {f.metric for f in figures_of([pool], against, 3)}
    # Of the second prompt one answer has no verdict: it counts for no n, also where another one is the best.
    partly = [0.5, 1.0, 1.0, 0.5, 1.0, math.nan, 0.5, 0.0, 1.0]
    found = figure("win_rate", [best_of(sample("p", rewards, prompts, win_rate=partly), n)], against, 3)
    expected = [np.array(partly)[i : i + 3] @ best_of_n_weights(rewards[i : i + 3], n) for i in (0, 6)]
    assert (found.value, found.count) == (pytest.approx(np.mean(expected)), 2)


def test_a_best_of_n_is_held_against_an_answer_that_is_not_among_its_own():
    """As one that is drawn anew would be: the best of n of one distribution wins n / (n + 1) of the time."""
    count, size = 4000, 4
    rewards = np.random.default_rng(0).normal(size=(count, size))
    won, tied = wins(rewards.ravel().tolist(), rewards[:, :1].repeat(size, 1).ravel().tolist(), [False] * rewards.size)
    prompts, first = np.repeat(range(count), size), np.tile([True, False, False, False], count)
    pool, against = (
        sample("p", rewards.ravel(), prompts, win_rate=won, ties=tied),
        sample("b", rewards[:, 0], win_rate=[0.5] * count, ties=[1] * count),
    )
    for n in (1, 2, 3):
        found = {f.metric: f for f in figures_of([best_of(pool, n, first)], against, count)}
        assert found["win_rate"].value == pytest.approx(n / (n + 1), abs=0.02)
        assert found["ties"].value == 0
    found = {f.metric: f for f in figures_of([best_of(pool, size, first)], against, count)}
    assert found["win_rate"].value == pytest.approx(1 - 1 / (2 * size), abs=0.02)
    assert found["ties"].value == pytest.approx(1 / size, abs=0.02)


def test_a_best_of_n_counts_where_answers_that_lack_a_number_can_never_be_it():
    own = {"win_rate": [0.5, math.nan, 1.0], "coherence": [math.nan, 0.5, 0.7]}
    pool, against = sample("p", [0.0, None, 2.0], [0] * 3, **own), sample("b", [0.0], win_rate=[0.5], coherence=[1])
    value = {f.metric: f.value for f in figures_of([best_of(pool, 3)], against, 1)}
    assert (value["win_rate"], value["coherence"]) == (1, 0.7)
    # One alone may be that without a reward; an empty answer has no coherence, which is no gap.
    value = {f.metric: f.value for f in figures_of([best_of(pool, 1)], against, 1)}
    assert "win_rate" not in value and value["coherence"] == pytest.approx(0.6)


# Metrics by hand.


@pytest.mark.parametrize("at_once", [1, 1000, 10**7])
def test_the_worst_tenth_by_hand(at_once, monkeypatch):
    monkeypatch.setattr(comparison_figures, "_AT_ONCE", at_once)
    rewards = np.arange(25.0)[::-1]
    found = figure("reward_worst_tenth", [sample("a", rewards)], sample("b", rewards + 1), 25)
    assert found.value == pytest.approx((0 + 1 + 0.5 * 2) / 2.5)
    assert found.difference == pytest.approx(-1)
    chosen = torch.randint(25, (NUM_RESAMPLES, 25), generator=torch.Generator().manual_seed(0)).numpy()
    lowest = np.sort(rewards[chosen], axis=1)[:, :3]
    expected = np.quantile(lowest @ [1, 1, 0.5] / 2.5, [0.025, 0.975])
    np.testing.assert_allclose((found.low, found.high), expected)


def test_rates_by_hand():
    a = sample("a", [0.0, 0.0], kl=[1.0, 5.0], length=[10, 2], base=[20.0, 4.0], seconds=[0.5, 1.0])
    value = {f.metric: f.value for f in figures_of([a], sample("b", [0.0, 0.0]), 2)}
    assert value["kl_per_token"] == pytest.approx(6 / 12)
    assert value["kl_per_response"] == 3
    assert value["perplexity"] == pytest.approx(math.exp(24 / 12))
    assert value["tokens_per_second"] == pytest.approx(12 / 1.5)
    assert value["seconds"] == 0.75


def test_times_have_no_interval():
    a = sample("a", [0.0, 1.0], length=[10, 2], seconds=[0.5, 1.0])
    found = {f.metric: f for f in figures_of([a], sample("b", [0.0, 0.0]), 2)}
    for name in ("seconds", "tokens_per_second"):
        figure = found[name]
        ends = (figure.low, figure.high, figure.difference_low, figure.difference_high)
        assert ends == (-math.inf, math.inf) * 2
    assert math.isfinite(found["reward"].low)


def test_an_answer_without_tokens_counts_and_a_policy_that_nobody_knows_has_no_kl():
    a = sample("a", [0.0, 0.0], kl=[0.0, 4.0], length=[0, 8], base=[0.0, 8.0])
    b = sample("b", [0.0, 0.0], kl=[2.0, 2.0], length=[4, 4], base=[4.0, 4.0])
    found = figure("kl_per_token", [a], b, 2)
    assert (found.value, found.count, found.difference) == (0.5, 2, 0)
    unknown = sample("c", [0.0, 0.0], kl=[math.nan] * 2)
    assert not {"kl_per_token", "kl_per_response"} & {f.metric for f in figures_of([unknown], b, 2)}
    silent = sample("d", [0.0, 0.0], kl=[0.0] * 2, length=[0] * 2, base=[0.0] * 2)
    metrics = {f.metric: f.value for f in figures_of([silent], b, 2)}
    assert metrics["kl_per_response"] == 0 and "perplexity" not in metrics and "kl_per_token" not in metrics


def test_wins_and_ties_by_hand():
    won, tied = wins([1.0, 2.0, 0.0, None], [1.0, 1.0, 1.0, 1.0], [False] * 4)
    assert won == [0.5, 1.0, 0.0, None]
    assert tied == [1.0, 0.0, 0.0, None]


def test_one_text_ties_with_itself_whatever_its_batch_makes_of_its_score():
    won, tied = wins([1.0 + 1e-7, 1.0 + 1e-7, None], [1.0, 1.0, None], [True, False, True])
    assert (won, tied) == ([0.5, 1.0, None], [1.0, 0.0, None])


def rollout(prompt_number=0, sample=0, completion="w1", ids=(7,), **more):
    return Rollout("w5", completion, [5], list(ids), True, prompt_number=prompt_number, sample=sample, **more)


def test_answers_are_held_against_the_same_sample_or_of_a_pool_against_its_best():
    own = [rollout(3, 0), rollout(3, 1), rollout(8, 0), rollout(8, 1)]
    single = [rollout(3), rollout(8)]
    pool = [rollout(n, s) for n in (3, 8) for s in range(3)]
    assert matched_references(own, single) == [0, 0, 1, 1]
    assert matched_references(own, pool) == [0, 1, 3, 4]
    best = best_places(pool, [0.0, 2.0, 2.0, None, None, -1.0])
    assert best == [1, 5]
    assert matched_references(own, pool, best) == [1, 1, 5, 5]


def test_of_answers_length_end_repetition_and_diversity():
    answers = [rollout(4, 0, "a b c d a b c d", range(9)), rollout(9, 0, "", ())]
    answers[1].finished = False
    found = sample_of("x", None, answers, {"reward": [1.0, None]}, {4: 0, 9: 1})
    assert found.prompts.tolist() == [0, 1]
    assert found.values["length"].tolist() == [9, 0]
    assert found.values["finished"].tolist() == [1, 0] and found.values["truncated"].tolist() == [0, 1]
    assert found.values["repetition"].tolist() == [pytest.approx(1 / 5), 0]
    # 2-, 3- and 4-grams: 4 distinct of 7, 4 of 6, 4 of 5.
    assert found.values["diversity"].tolist() == [pytest.approx(4 / 8 * 4 / 7 * 4 / 6), 0]
    assert repetition("a b c") == 0


def test_several_rewards_are_summed_in_the_deviations_of_the_head_that_knows_their_names():
    model = tiny_model("llama")
    head = tiny_head(model, num_objectives=2)
    head.config.reward_mean, head.config.reward_std = [1.0, 10.0], [2.0, 5.0]
    controlled = ReControlForCausalLM.from_model(model, head)
    bench = SimpleNamespace(model=controlled, rewards={"kind": None, "brief": None}, combine_rewards="none")
    assert standardised(bench, [3.0, 20.0]) == 23
    head.config.training = SimpleNamespace(rewards=["brief", "kind"])
    assert standardised(bench, [20.0, 3.0]) == pytest.approx((20 - 10) / 5 + (3 - 1) / 2)
    assert standardised(bench, None) is None
    assert (
        standardised(SimpleNamespace(model=model, rewards={"a": None, "b": None}, combine_rewards="none"), [1.0, 2.0])
        == 3
    )


def test_a_classifier_in_a_folder_is_known_by_the_name_that_the_head_has_for_it(tmp_path):
    head = tiny_head(tiny_model("llama"), num_objectives=2)
    head.config.training = SimpleNamespace(rewards=["rm", "vader"])
    (tmp_path / "here" / "rm").mkdir(parents=True)
    (tmp_path / "there" / "rm").mkdir(parents=True)
    assert knows_units(head.config, ["vader", str(tmp_path / "here" / "rm")])
    assert not knows_units(head.config, ["vader", "other"])
    # Which of the two it was nobody knows.
    assert not knows_units(head.config, [str(tmp_path / "here" / "rm"), str(tmp_path / "there" / "rm")])


def test_equal_prompts_are_in_a_resample_together():
    rewards = [1.0, 5.0, 3.0]
    single, doubled = sample(rewards=rewards), sample(rewards=rewards * 2)
    once = figure("reward", [single], single, 3)
    [twice] = [f for f in figures_of([doubled], doubled, 6, np.array([7, 8, 9] * 2)) if f.metric == "reward"]
    assert (twice.value, twice.low, twice.high, twice.count) == (once.value, once.low, once.high, 3)
    assert figures_of([single], single, 3, np.array([9, 7, 8])) == figures_of([single], single, 3)
    apart = figure("reward", [doubled], doubled, 6)
    assert apart.high - apart.low < twice.high - twice.low and apart.count == 6


# Likelihoods of a real (tiny) model.


def naive(model, rollout, control, asked=None):
    """(KL, -log π0, log-ratio) of one response, position by position, each with a forward of its own."""
    kl = base_nats = ratio = 0.0
    temperature = rollout.temperature or 1.0
    with torch.no_grad():
        for i, token in enumerate(rollout.completion_ids):
            begun = rollout.completion_ids[:i]
            with model.disable_control():
                plain = model(torch.tensor([rollout.prompt_ids + begun])).logits[0, -1].double()
            own = own_logits(model, control, rollout.prompt_ids if asked is None else asked, begun)
            log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (own, plain))
            p = log_p.exp()
            kl += float((p * (log_p - log_q))[p > 0].sum())
            base_nats -= float(torch.log_softmax(plain, -1)[token])
            ratio += float(log_p[token] - log_q[token])
    return kl, base_nats, ratio


def own_logits(model, control, prompt, begun):
    """The logits that generation draws the next token from: the prompt but its last position is not edited."""
    context = model.disable_control() if control is None else model.use_control(control)
    with context:
        cache = None
        if len(prompt) > 1:
            with model.disable_control():
                cache = model(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        out = model(torch.tensor([[prompt[-1], *begun]]), past_key_values=cache)
    return out.logits[0, -1].double()


CASES = {
    "last layer": ({}, ControlConfig("ascent", step_size=0.4), 1.0),
    "temperature": ({}, ControlConfig("ascent", step_size=0.4), 0.6),
    "middle layer": ({"layer": 0}, ControlConfig("ascent", step_size=0.4), 1.0),
    "lm_head": ({"hook_point": "lm_head"}, ControlConfig("advantage", step_size=0.7), 1.3),
    "mask": ({"hook_point": "lm_head"}, ControlConfig("advantage", step_size=0.7, plausibility=0.2), 1.0),
    "greedy": ({"hook_point": "lm_head"}, ControlConfig("advantage", step_size=0.7), 0.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("instructed", [False, True], ids=["plain", "instructed"])
def test_likelihoods_are_what_position_by_position_gives(case, instructed):
    where, control, temperature = CASES[case]
    model = tiny_model("llama")
    model = ReControlForCausalLM.from_model(model, tiny_head(model, **where))
    tokenizer = tiny_tokenizer()
    prompts = ["w10 w11 w12", "w20", "w30 w31"]
    drawn = generate_rollouts(
        model, tokenizer, prompts, control=control, max_new_tokens=5, temperature=temperature, progress=lambda *_: None
    )
    drawn.append(rollout(3, completion="", ids=(), temperature=temperature))
    asked = [[40, 41, *r.prompt_ids] for r in drawn] if instructed else None
    found = likelihoods(model, drawn, lambda: model.use_control(control), asked=asked, batch_size=3)
    for i, (one, each) in enumerate(zip(drawn, found, strict=True)):
        kl, base, ratio = naive(model, one, control, asked and asked[i])
        assert (each.kl, each.base) == pytest.approx((kl, base), rel=1e-4, abs=1e-5)
        if math.isfinite(ratio):
            assert each.log_ratio == pytest.approx(ratio, rel=1e-4, abs=1e-4)
    assert found[-1].kl == 0 and found[-1].base == 0
    if not instructed:
        with model.use_control(control):
            mean = kl_divergence(model, drawn)
        assert mean == pytest.approx(sum(f.kl for f in found) / sum(len(r.completion_ids) for r in drawn))
        assert mean > 1e-3
    unknown = likelihoods(model, drawn)
    assert [f.base for f in unknown] == pytest.approx([f.base for f in found], rel=1e-5)
    assert unknown[0].kl is None


# Logits that are the LM head's alone, capped, scaled, of another width, and of a batch that pads what is read.
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "cohere", "granite", "opt_projected", "gpt2", "mamba", "xlstm", "llava"]
)
def test_one_forward_for_base_and_policy_gives_what_two_give(family):
    model = tiny_model(family)
    model = ReControlForCausalLM.from_model(model, tiny_head(model, hook_point="lm_head"))
    control, quiet = ControlConfig("advantage", step_size=0.7), {"progress": lambda *_: None}
    prompts = ["w10 w11 w12", "w20", "w30 w31"]
    drawn = generate_rollouts(model, tiny_tokenizer(), prompts, control=control, max_new_tokens=5, **quiet)
    calls = []
    with model.register_forward_pre_hook(lambda *_: calls.append(1)):
        both = likelihoods(model, drawn, lambda: model.use_control(control), batch_size=3)
        twice = len(calls)
        found = likelihoods(model, drawn, lambda: model.use_control(control), batch_size=3, only_at_head=True)
    for one, other in zip(found, both, strict=True):
        assert (one.kl, one.base, one.log_ratio) == pytest.approx((other.kl, other.base, other.log_ratio), rel=1e-5)
        assert one.kl > 1e-3
    if family == "llama":
        assert len(calls) - twice == twice // 2
    if family in ("gemma2", "cohere", "granite"):
        assert len(calls) - twice == twice


@pytest.mark.parametrize("at_once", [1, 8000, 10**9])
def test_no_forward_keeps_more_logits_than_fit_into_memory(at_once, monkeypatch):
    monkeypatch.setattr(response_batches, "_LOGITS_AT_ONCE", at_once)
    model, sizes = tiny_model("llama"), []
    asked = [[*range(10, 10 + length)] for length in (2, 3, 20, 4, 9)]
    drawn = [replace(rollout(i, ids=range(40, 46)), prompt_ids=ids) for i, ids in enumerate(asked)]
    alone = [likelihoods(model, [one])[0].base for one in drawn]
    likelihoods(model, drawn, batch_size=5)  # first finds out whether the model reads what it is padded with
    with model.register_forward_hook(lambda module, args, output: sizes.append(output.logits.numel())):
        found = likelihoods(model, drawn, batch_size=5)
    assert len(sizes) == {1: 5, 8000: 3, 10**9: 1}[at_once]
    assert all(size <= max(at_once, 7 * model.config.vocab_size) for size in sizes)
    assert [each.base for each in found] == pytest.approx(alone, rel=1e-5)


def test_the_mean_log_ratio_of_samples_is_the_kl():
    """On the policy's own samples both estimate one number."""
    model = tiny_model("llama")
    model = ReControlForCausalLM.from_model(model, tiny_head(model, "lm_head"))
    control = ControlConfig("advantage", step_size=0.3)
    drawn = generate_rollouts(
        model,
        tiny_tokenizer(),
        ["w10 w11"],
        control=control,
        num_samples=400,
        max_new_tokens=4,
        batch_size=200,
        progress=lambda *_: None,
    )
    found = likelihoods(model, drawn, lambda: model.use_control(control), batch_size=200)
    ratios = np.array([f.log_ratio for f in found])
    mean = np.mean([f.kl for f in found])
    assert mean == pytest.approx(ratios.mean(), abs=4 * ratios.std() / 20)


# Coherence.


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("embeddings")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    from sentence_transformers.sentence_transformer import modules as models

    bert = models.Transformer(str(folder / "bert"))
    model = sentence_transformers.SentenceTransformer(modules=[bert, models.Pooling(16, pooling_mode="mean")])
    model.save(str(folder / "model"))
    return folder


def test_coherence_is_the_cosine_of_mean_states(embeddings):
    from transformers import BertModel

    answers = [
        Rollout("w10 w11 w12", "w13 w14", [1], [1], True),
        Rollout([{"role": "user", "content": "w10 w11 w12"}], "w20 w21 w22 w23", [1], [1], True),
        Rollout("w10", "  ", [1], [1], True),
    ]
    scorer = coherence_scorer(str(embeddings / "model"))
    found = scorer.score(answers, [])["coherence"]
    bert = BertModel.from_pretrained(embeddings / "bert").eval()
    tokenizer = tiny_tokenizer()

    def embedded(text):
        with torch.no_grad():
            return bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()

    for value, completion in zip(found[:2], ["w13 w14", "w20 w21 w22 w23"], strict=True):
        a, b = embedded("w10 w11 w12"), embedded(completion)
        assert value == pytest.approx(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), abs=1e-5)
    assert found[2] is None


# Table and plots.


def test_the_table_says_which_differences_cannot_be_told_from_none():
    rng = np.random.default_rng(0)
    base = sample("base", rng.normal(size=40))
    samples = [
        base,
        sample("clear", base.values["reward"] + 1),
        sample("wide", base.values["reward"] + 0.01 * rng.normal(size=40)),
        sample("same", base.values["reward"]),
        sample("odd | name", base.values["reward"] + 2, strength=0.5),
    ]
    text = table(figures_of(samples, base, 40), "base", 40)
    assert "no difference in reward: wide." in text
    assert "| odd \\| name | 0.5 |" in text
    assert len({line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_every_metric_has_a_definition_and_plots_take_any_name(tmp_path):
    rewards = [0.0, 1.0, 2.0]
    names = ["a $x^ b$ _c", "_hidden", "好", "a" * 300]
    samples = [sample(name, rewards, strength=1.0, diversity=[0.5] * 3) for name in names]
    figures = figures_of(samples, samples[0], 3)
    assert {f.metric for f in figures} <= set(METRICS)
    write_plots(tmp_path, figures, [])
    assert "_hidden" in (tmp_path / "frontier.svg").read_text()
    assert "a $x^ b$ _c" in (tmp_path / "frontier.svg").read_text()


def test_every_metric_is_explained_to_users():
    page = (Path(__file__).parents[1] / "docs" / "comparing.md").read_text(encoding="utf-8")
    assert not [name for name in METRICS if f"`{name}`" not in page.partition("## Metrics")[2]]
