"""Figures of a comparison: each metric of each row, with its interval and its difference to another row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.rollouts import Rollout
from ..intervals import choices, with_interval
from ..metrics import diversity, repetition
from ..rivals.plain import best_of_n_kl, best_of_n_weights
from .scores import Scores


def row_label(control: str, strength: float | None) -> str:
    """What a row is called in messages and under the table."""
    return control if strength is None else f"{control} {strength:g}"


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
            Ends of its 95 % interval: bootstrap over prompts. Infinite where nothing is known of it: with a single
            prompt, and for times.
        count (`int`):
            Different prompts that it is of.
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


# Among what is measured of an answer: a number for what else its time depends on.
TIMED_UNDER = "timed_under"
# How metrics begin that an answer lacks by what it is: the reward scores no such answer, or it has no word.
_BY_NATURE_MISSING = ("reward", "coherence")


def best_of(pool: Sample, n: int, held_against: np.ndarray | None = None) -> Sample:
    """
    The best of n of a pool of the base's answers, by `reward`: answers without one are never the best.

    Of a pool that holds the very answer that all are held against, the win rate and the ties of the best of fewer than
    all are those of the other answers: one that is drawn anew is not among them either.

    A prompt has a number only where all answers of its pool have one that may be the best of any n. What is missing
    is not so by chance: the base's own answer ties with itself and needs no verdict, so that a judge which refuses all
    else would put every best of n at a tie.

    Args:
        held_against (`numpy.ndarray`, *optional*):
            Of each answer whether it is that one, as booleans.
    """
    rewards, prompts = pool.values["reward"], np.unique(pool.prompts)
    ranked = np.where(np.isnan(rewards), -np.inf, rewards)
    weights = np.zeros(len(rewards))
    against_others = {name: pool.values[name].copy() for name in ("win_rate", "ties") if name in pool.values}
    for own in (np.flatnonzero(pool.prompts == prompt) for prompt in prompts):
        weights[own] = best_of_n_weights(ranked[own], n)
        others = own if held_against is None else own[~held_against[own]]
        if n <= len(others) < len(own):
            for values in against_others.values():
                values[own] = best_of_n_weights(ranked[others], n) @ np.nan_to_num(values[others])
    # Until here the pool's KL is that of its best of all.
    largest = best_of_n_kl(int(np.bincount(pool.prompts).max()))
    more = {"kl": pool.values["kl"] - largest + best_of_n_kl(n), "seconds": pool.values["seconds"] * n}
    values, may_win = pool.values | against_others | more, ~np.isnan(rewards) | (weights > 0)
    for name in values:
        if not name.startswith(_BY_NATURE_MISSING):
            gaps = np.bincount(pool.prompts, np.isnan(pool.values[name]) & may_win) > 0
            values[name] = np.where(gaps[pool.prompts], math.nan, values[name])
    return Sample(pool.control, float(n), pool.prompts, weights, values)


# Of a metric that is no mean of values of its own name the numerator and the denominator; without one, 1.
_RATIOS = {
    "kl_per_token": ("kl", "length"),
    "kl_per_response": ("kl", None),
    "perplexity": ("base", "length"),
    "tokens_per_second": ("length", "seconds"),
}
_NO_METRICS = ("kl", "base", TIMED_UNDER)
# The answers of a part share one time, so that prompts say nothing of how certain it is.
_OF_PARTS = ("seconds", "tokens_per_second")
_WORST_TENTH = "reward_worst_tenth"
# Numbers in memory at once.
_AT_ONCE = 4_000_000


def _sums(sample: Sample, metric: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Of each prompt the weighted mean of its answers' numerators, that of their denominators, and whether it has an
    answer with both, each `(count,)`: a metric is the sum of the first over that of the second.
    """
    numerator, denominator = _RATIOS.get(metric, (metric, None))
    values = sample.values[numerator]
    below = np.ones_like(values) if denominator is None else sample.values[denominator]
    weights = np.where(np.isnan(values) | np.isnan(below), 0.0, sample.weights)
    total = np.bincount(sample.prompts, weights, count)
    with np.errstate(invalid="ignore", divide="ignore"):
        top, bottom = (np.bincount(sample.prompts, weights * np.nan_to_num(x), count) / total for x in (values, below))
    present = total > 0
    return np.where(present, top, 0.0), np.where(present, bottom, 0.0), present


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
    if metric == _WORST_TENTH:
        return _worst_tenth(sample, chosen)
    numerators, denominators, _ = _sums(sample, metric, count)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        values = (chosen @ numerators) / (chosen @ denominators)
        return np.exp(values) if metric == "perplexity" else values


def prompts_with(sample: Sample, metric: str, count: int) -> np.ndarray:
    """Which prompts have a number of a metric, as booleans."""
    return _sums(sample, "reward" if metric == _WORST_TENTH else metric, count)[2]


def figures_of(samples: Sequence[Sample], against: Sample, count: int, same: np.ndarray | None = None) -> list[Figure]:
    """
    All figures of all rows.

    Args:
        samples (sequence of [`Sample`]):
            The rows.
        against ([`Sample`]):
            The row that differences are to.
        count (`int`):
            Prompts that were compared on.
        same (`numpy.ndarray` of shape `(count,)`, *optional*):
            Of each prompt a number that is the same for equal ones: these are in a resample together. By default no
            two are equal.
    """
    numbers: dict[int, int] = {}
    # In their own order, so that prompts that are all different have the resamples that they have without it.
    same = np.array([numbers.setdefault(n, len(numbers)) for n in (range(count) if same is None else same.tolist())])
    found = []
    for sample in samples:
        metrics = dict.fromkeys([*(name for name in sample.values if name not in _NO_METRICS), *_RATIOS])
        if "reward" in metrics:
            metrics[_WORST_TENTH] = None
        found += [_figure(sample, against, metric, same) for metric in metrics]
    order = list(METRICS)
    return sorted(
        (figure for figure in found if figure is not None),
        key=lambda figure: order.index(figure.metric) if figure.metric in order else len(order),
    )


def _figure(sample: Sample, against: Sample, metric: str, same: np.ndarray) -> Figure | None:
    """One figure; `None` where the row has no number of it."""
    count = len(same)
    chosen, present = choices(len(np.unique(same)))[:, same], prompts_with(sample, metric, count)
    prompts, is_known = len(np.unique(same[present])), metric not in _OF_PARTS
    value = with_interval(values_on(sample, metric, count, chosen), prompts * is_known)
    if not math.isfinite(value[0]):
        return None
    difference: tuple[float, ...] = ()
    if sample is not against:
        shared = present & prompts_with(against, metric, count)
        own, other = (values_on(each, metric, count, chosen * shared) for each in (sample, against))
        change = with_interval(own - other, len(np.unique(same[shared])) * is_known)
        difference = change if math.isfinite(change[0]) else ()
    return Figure(sample.control, sample.strength, metric, *value, prompts, *difference)


def _worst_tenth(sample: Sample, chosen: np.ndarray) -> np.ndarray:
    """As [`values_on`]: the mean of the tenth of all answers with the lowest rewards."""
    rewards = sample.values["reward"]
    known = np.flatnonzero(~np.isnan(rewards) & (sample.weights > 0))
    order = known[np.argsort(rewards[known], kind="stable")]
    found = []
    # A few choices at a time: each takes a number for every answer.
    for few in np.array_split(chosen, min(len(chosen), 1 + len(chosen) * len(order) // _AT_ONCE)):
        weights = few[:, sample.prompts[order]] * sample.weights[order]
        before = np.cumsum(weights, axis=1) - weights
        used = np.clip(0.1 * weights.sum(1, keepdims=True) - before, 0, weights)
        with np.errstate(invalid="ignore"):
            found.append((used @ rewards[order]) / used.sum(1))
    return np.concatenate(found)
