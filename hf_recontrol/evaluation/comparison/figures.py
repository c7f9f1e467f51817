"""Figures of a comparison: each metric of each row, with its interval and its difference to another row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...data.rollouts import Rollout
from ..intervals import interval, resamples
from ..metrics import diversity, repetition
from ..rivals.plain import best_of_n_kl, best_of_n_weights
from .scores import Scores


@dataclass(frozen=True)
class Figure:
    """
    One number of one row.

    Attributes:
        control (`str`), strength (`float`, *optional*):
            The row. Of `best_of_n` the strength is n.
        metric (`str`):
            What it is, see [`METRICS`].
        value (`float`):
            Over all prompts.
        low, high (`float`):
            Ends of its 95 % interval: bootstrap over prompts.
        count (`int`):
            Prompts that it is of.
        difference, difference_low, difference_high (`float`, *optional*):
            To the row that the comparison is against, over the prompts that both have, and its paired 95 % interval.
    """

    control: str
    strength: float | None
    metric: str
    value: float
    low: float
    high: float
    count: int
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


# The metrics. A mean is over prompts, of each the mean of its answers (of the best of n: the weighted mean).
METRICS = {
    "reward": "Mean reward. Of several each has its own, `reward NAME`, and `reward` is their sum: in standard "
    "deviations of the head's training if it was trained on rewards of these names, else as they are.",
    "reward_worst_tenth": "Mean reward of the tenth of all answers with the lowest.",
    "judge": "Mean score by the judge, which no head was trained on.",
    "win_rate": "Share of answers that the judge (without one: the reward) puts above the answer compared against, to "
    "the same prompt and with the same noise; a tie counts half. In [0, 1].",
    "ties": "Share of answers that tie with the one compared against.",
    "diversity": "`Π (1 - rep_n)` over n = 2, 3, 4 in each answer's own words (Kong et al. 2024), see `diversity`; in "
    "[0, 1].",
    "repetition": "Share of an answer's word 4-grams that stood in it before (seq-rep-4 of Welleck et al. 2020).",
    "coherence": "Cosine of the embeddings of prompt and answer (Kong et al. 2024); empty answers are left out.",
    "perplexity": "`exp` of the mean `-log π0` of all answers' tokens: under the base, at temperature 1, as the user "
    "asked (without an instruction).",
    "kl_per_token": "Nats to the base for each token: all answers' nats over all their tokens.",
    "kl_per_response": "Nats to the base for each answer: the sum over its tokens of the exact `KL(π ‖ π0)` over the "
    "vocabulary, on the control's own answers. Both at the temperature of the sampling (1 for greedy answers), before "
    "top-p and the like. Of the best of n: `log n - (n - 1) / n`.",
    "length": "Tokens of an answer, with the one that ended it.",
    "finished": "Share of answers that ended by themselves, by an end token or a stop string.",
    "truncated": "Share of answers that were cut at the limit of new tokens.",
    "seconds": "Wall-clock seconds for an answer: those of a part over its answers. Of the best of n: for all n.",
    "tokens_per_second": "Tokens of the answers over the seconds for them.",
}


@dataclass
class Sample:
    """
    Answers of one row, as arrays over answers.

    Args:
        control (`str`), strength (`float`, *optional*):
            The row.
        prompts (`numpy.ndarray`):
            Of each answer the place of its prompt among those compared on.
        weights (`numpy.ndarray`):
            How much each answer counts among those of its prompt.
        values (`dict[str, numpy.ndarray]`):
            By name; NaN where an answer has none.
    """

    control: str
    strength: float | None
    prompts: np.ndarray
    weights: np.ndarray
    values: dict[str, np.ndarray]


def sample_of(
    control: str,
    strength: float | None,
    rollouts: Sequence[Rollout],
    measured: Scores,
    places: dict[int, int],
) -> Sample:
    """
    A row's answers as arrays.

    Args:
        measured (`dict[str, list]`):
            What was measured of each answer, by name.
        places (`dict[int, int]`):
            Of each prompt's number its place.
    """
    values = {name: np.array([math.nan if x is None else x for x in each]) for name, each in measured.items()}
    values["length"] = np.array([len(rollout.completion_ids) for rollout in rollouts], float)
    values["finished"] = np.array([rollout.finished for rollout in rollouts], float)
    values["truncated"] = 1 - values["finished"]
    values["diversity"] = np.array([diversity([rollout.completion]) for rollout in rollouts])
    values["repetition"] = np.array([repetition(rollout.completion) for rollout in rollouts])
    prompts = np.array([places[rollout.prompt_number] for rollout in rollouts])
    return Sample(control, strength, prompts, np.ones(len(rollouts)), values)


def best_of(pool: Sample, n: int) -> Sample:
    """The best of n of a pool of the base's answers, by `reward`: answers without one are never the best."""
    weights, rewards = np.zeros(len(pool.prompts)), pool.values["reward"]
    for prompt in np.unique(pool.prompts):
        own = np.flatnonzero(pool.prompts == prompt)
        ranked = np.where(np.isnan(rewards[own]), -np.inf, rewards[own])
        weights[own] = best_of_n_weights(ranked, n)
    # Until here the pool's KL is that of its best of all.
    largest = best_of_n_kl(int(np.bincount(pool.prompts).max()))
    more = {"kl": pool.values["kl"] - largest + best_of_n_kl(n), "seconds": pool.values["seconds"] * n}
    return Sample(pool.control, float(n), pool.prompts, weights, pool.values | more)


def _ratio(numerator: str, denominator: str | None) -> Callable:
    """
    Of each prompt the weighted mean of its answers' numerators, that of their denominators (without one: 1), and
    whether it has an answer with both: a figure is the sum of the former over the sum of the latter.
    """

    def sums(sample: Sample, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values = sample.values[numerator]
        below = np.ones_like(values) if denominator is None else sample.values[denominator]
        weights = np.where(np.isnan(values) | np.isnan(below), 0.0, sample.weights)
        total = np.bincount(sample.prompts, weights, count)
        with np.errstate(invalid="ignore", divide="ignore"):
            top, bottom = (
                np.bincount(sample.prompts, weights * np.nan_to_num(x), count) / total for x in (values, below)
            )
        present = total > 0
        return np.where(present, top, 0.0), np.where(present, bottom, 0.0), present

    return sums


# Of each metric the values that it is the mean of, or (numerator, denominator).
_RATIOS = {
    "kl_per_token": ("kl", "length"),
    "kl_per_response": ("kl", None),
    "perplexity": ("base", "length"),
    "tokens_per_second": ("length", "seconds"),
}
_NO_METRICS = ("kl", "base")


def values_on(sample: Sample, metric: str, count: int, chosen: np.ndarray) -> np.ndarray:
    """
    A metric of a row over choices of prompts.

    Args:
        count (`int`):
            Prompts that were compared on.
        chosen (`numpy.ndarray` of shape `(choices, count)`):
            How often each prompt is in each choice.

    Returns:
        `numpy.ndarray` of shape `(choices,)`, NaN where no prompt in it has a number.
    """
    numerators, denominators, _ = _ratio(*_RATIOS.get(metric, (metric, None)))(sample, count)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        values = (chosen @ numerators) / (chosen @ denominators)
        return np.exp(values) if metric == "perplexity" else values


def prompts_with(sample: Sample, metric: str, count: int) -> np.ndarray:
    """Which prompts have a number of a metric, as booleans."""
    return _ratio(*_RATIOS.get(metric, (metric, None)))(sample, count)[2]


def figures_of(samples: Sequence[Sample], against: Sample, count: int) -> list[Figure]:
    """
    All figures of all rows.

    Args:
        samples (sequence of [`Sample`]):
            The rows.
        against ([`Sample`]):
            The row that differences are to.
        count (`int`):
            Prompts that were compared on.
    """
    found = []
    for sample in samples:
        names = [name for name in sample.values if name not in _NO_METRICS] + ["kl_per_token", "kl_per_response"]
        for metric in dict.fromkeys([*names, "perplexity", "tokens_per_second"]):
            numerator, denominator = _RATIOS.get(metric, (metric, None))
            if not (_has(sample, numerator).any()):
                continue
            own = _ratio(numerator, denominator)(sample, count)
            other = None if sample is against else _ratio(numerator, denominator)(against, count)
            found.append(_figure(sample, metric, own, other, np.exp if metric == "perplexity" else None))
        found += [_worst_tenth(sample, against, name, count) for name in ("reward",) if name in names]
    order = list(METRICS)
    return sorted(
        (figure for figure in found if figure is not None),
        key=lambda figure: order.index(figure.metric) if figure.metric in order else len(order),
    )


def _figure(
    sample: Sample,
    metric: str,
    own: tuple[np.ndarray, np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    transform: Callable | None,
) -> Figure | None:
    def statistic(sums: Sequence[np.ndarray], chosen: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            value = (chosen @ sums[0]) / (chosen @ sums[1])
            return value if transform is None else transform(value)

    times = resamples(len(own[0]))
    present = own[2]
    value = float(statistic(own, np.ones(len(present))))
    if not math.isfinite(value):
        return None
    low, high = _interval(statistic(own, times), int(present.sum()))
    difference: tuple[float, ...] = ()
    if other is not None:
        shared = present & other[2]
        pair = [tuple(np.where(shared, x, 0.0) for x in sums[:2]) for sums in (own, other)]
        ones = np.ones(len(shared))
        change = float(statistic(pair[0], ones) - statistic(pair[1], ones))
        if math.isfinite(change):
            changes = statistic(pair[0], times) - statistic(pair[1], times)
            difference = (change, *_interval(changes, int(shared.sum())))
    return Figure(sample.control, sample.strength, metric, value, low, high, int(present.sum()), *difference)


def _has(sample: Sample, name: str) -> np.ndarray:
    """Which answers count and have a number."""
    return ~np.isnan(sample.values[name]) & (sample.weights > 0)


def _interval(values: np.ndarray, prompts: int) -> tuple[float, float]:
    return interval(values) if prompts > 1 else (-math.inf, math.inf)


def _worst_tenth(sample: Sample, against: Sample, name: str, count: int) -> Figure | None:
    """Mean of the tenth of all answers with the lowest values."""
    times = resamples(count)

    def lowest(of: Sample, chosen: np.ndarray) -> np.ndarray:
        values = of.values[name]
        known = np.flatnonzero(_has(of, name))
        order = known[np.argsort(values[known], kind="stable")]
        weights = chosen[:, of.prompts[order]] * of.weights[order]
        before = np.cumsum(weights, axis=1) - weights
        room = 0.1 * weights.sum(1, keepdims=True)
        used = np.clip(room - before, 0, weights)
        with np.errstate(invalid="ignore"):
            return (used @ values[order]) / used.sum(1)

    present, others = (np.bincount(of.prompts, _has(of, name), count) > 0 for of in (sample, against))
    prompts = int(present.sum())
    if not prompts:
        return None
    value = float(lowest(sample, np.ones((1, count)))[0])
    low, high = _interval(lowest(sample, times), prompts)
    difference: tuple[float, ...] = ()
    shared = present & others
    if sample is not against and shared.any():
        change = lowest(sample, shared[None].astype(float)) - lowest(against, shared[None].astype(float))
        changes = lowest(sample, times * shared) - lowest(against, times * shared)
        difference = (float(change[0]), *_interval(changes, int(shared.sum())))
    return Figure(sample.control, sample.strength, f"{name}_worst_tenth", value, low, high, prompts, *difference)
