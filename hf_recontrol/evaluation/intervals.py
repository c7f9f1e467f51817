"""Bootstrap intervals over prompts: one set of resamples, so that what is compared is paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

# More change the ends of a 95 % interval by less than they are worth.
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@lru_cache(maxsize=8)
def resamples(count: int) -> np.ndarray:
    """How often each of `count` prompts is in each of 2,000 resamples, `(2000, count)`: always the same."""
    chosen = torch.randint(count, (NUM_RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(NUM_RESAMPLES, count, dtype=torch.float64)
    times.scatter_add_(1, chosen, torch.ones_like(times))
    return times.numpy()


def finite(value: Any) -> Any:
    """A value as JSON has it: `None` for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The quantiles of a statistic's values on the resamples; those that are not finite are left out."""
    values = values[np.isfinite(values)]
    if not len(values):
        return -math.inf, math.inf
    outside = (1 - confidence) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


def choices(count: int) -> np.ndarray:
    """All of `count` prompts once, and below that their [`resamples`], `(2001, count)`."""
    return np.concatenate([np.ones((1, count)), resamples(count)])


def with_interval(values: np.ndarray, prompts: int) -> tuple[float, float, float]:
    """
    A statistic's value and the ends of its interval, from its values on the [`choices`] of prompts. A single prompt
    tells nothing: its interval is unbounded.
    """
    ends = interval(values[1:]) if prompts > 1 else (-math.inf, math.inf)
    return float(values[0]), *ends


def paired_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """
    Interval of the mean of paired differences, one for each prompt, by the bootstrap: the quantiles of the means of
    2,000 resamples of the prompts (always the same ones). A single prompt tells nothing: its interval is unbounded.

    Raises:
        `ValueError`: if there are no differences, or `confidence` is not between 0 and 1.
    """
    if not len(differences):
        raise ValueError("No differences to take the mean of.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence!r}.")
    if len(differences) == 1:
        return -math.inf, math.inf
    return interval(resamples(len(differences)) @ np.asarray(differences, np.float64) / len(differences), confidence)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """Interval of `sum(numerators) / sum(denominators)`, one pair for each prompt, by the same bootstrap."""
    if len(numerators) < 2:
        return -math.inf, math.inf
    times = resamples(len(numerators))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (times @ np.asarray(numerators, np.float64)) / (times @ np.asarray(denominators, np.float64))
    return interval(ratios)
