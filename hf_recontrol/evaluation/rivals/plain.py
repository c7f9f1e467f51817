"""Rivals that are the base itself: as it is, and the best of several of its responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np

from ...collection.sampling import sampling_config
from ...data.prompts import Prompts
from ...utils.checks import check_int
from ..likelihoods import base_only
from .rival import Answer, Bench, Rival, with_samples


class Base(Rival):
    """The base as it is. With an instruction in the prompt it is prompting."""

    draws_from_base_states = True

    def answer(self, prompts: Prompts, strength: float | None) -> list[Answer]:
        return [Answer(rollout, kl=[0.0] * len(rollout.completion_ids)) for rollout in self.bench.draw(prompts)]

    def policy(self, strength: float | None) -> AbstractContextManager:
        return base_only(self.bench.model)


class BestOfN(Base):
    """
    The one of n responses of the base with the highest reward (with several rewards: of their sum in standard
    deviations), for all n up to a pool's size.

    Args:
        n (`int`, *optional*, defaults to 4):
            Responses in the pool of each prompt.
    """

    def __init__(self, bench: Bench, n: int = 4):
        super().__init__(bench)
        check_int("n", n, low=2)
        self.pool = n
        self.bench = with_samples(bench, n)
        sampling_config(bench.model, bench.tokenizer, self.bench.sampling)  # raises where they would all be the same


def best_of_n_kl(n: int) -> float:
    """
    `log n - (n - 1) / n`: nats a response that the best of n is from the base, an upper bound which is exact where no
    two responses have the same reward and none is likely (Stiennon et al. 2020; Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(rewards: Sequence[float], n: int) -> np.ndarray:
    """
    The probability of each response of a pool to be the best of n that are drawn from the pool without putting any
    back: then a weighted mean over the pool is the unbiased estimate for the best of n, whatever is measured.
    Responses of one reward share their probabilities, as if one of them was taken at random. With `k` the rank of a
    response from the lowest, it is `C(k - 1, n - 1) / C(N, n)` (Nakano et al. 2021, appendix I).

    Args:
        rewards (sequence of `float`):
            Of the N responses of one prompt.
        n (`int`):
            From 1 to N.

    Returns:
        `numpy.ndarray` of shape `(N,)`, which sums to 1.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    size = len(rewards)
    check_int("n", n, 1, size)
    by_rank = np.array([math.comb(rank, n - 1) / math.comb(size, n) for rank in range(size)])
    order = np.argsort(rewards, kind="stable")
    weights = np.empty(size)
    weights[order] = by_rank
    for value in np.unique(rewards):
        alike = rewards == value
        weights[alike] = weights[alike].mean()
    return weights
