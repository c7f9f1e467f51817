"""What more rollouts would be worth, before any is sampled: a static vector's gain by how many it was fitted on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.states import States, StateStore
from ..training.targets import episode_mask, pad_episodes, value_differences

# Prompts are in one of so many folds; what is measured on one is fitted on 1, 2 and 4 of the others.
_FOLDS = 5
_SIZES = (1, 2, 4)
# Ridge penalties of V and of the vector, relative to the mean eigenvalue of what they are fitted on. Smaller for the
# rewards of the response so far, which say more than any other number that V reads.
_VALUE_PENALTY, _VECTOR_PENALTY, _PREFIX_PENALTY = 0.3, 0.03, 0.003
# Numbers that are read at once.
_BATCH = 2**24
# Below any second moment and any deviation that matter.
_TINY = 1e-30
# Second moments are of so many states, drawn at random, or all: they cost the width's square for each.
_STATES_FOR_MOMENTS = 100_000
# Fewer prompts than this say nothing.
MIN_PROMPTS = 50
# 95 % of a normal distribution are so many standard errors around its mean.
_ENDS = 1.96


@dataclass(frozen=True)
class DataCurve:
    """
    The gain of a static vector by the number of responses that it was fitted on.

    Args:
        responses (`list[int]`):
            How many, for each point; each has twice as many as the one before.
        gain (`list[float]`):
            What the vector earns on prompts that it was not fitted on: standard deviations of the reward for the root
            of one nat a response, by the first term of the series in the step size.
        doubling (`(float, float, float)`):
            What the last doubling added to the gain, and its 95 % interval: of these vectors, paired over prompts.
    """

    responses: list[int]
    gain: list[float]
    doubling: tuple[float, float, float]

    @property
    def more_would_help(self) -> bool:
        """Whether the last doubling added to the gain beyond doubt."""
        return self.doubling[1] > 0

    @property
    def text(self) -> str:
        """What it says, in a sentence."""
        value, low, high = self.doubling
        conclusion = "more would help" if self.more_would_help else "these do not show that more would help"
        return (
            f"A static vector fitted to {self.responses[-2]} responses gains {self.gain[-2]:.2f} standard deviations "
            f"of the reward at 1 nat a response, one fitted to {self.responses[-1]} gains {self.gain[-1]:.2f}: twice "
            f"as many add {value:+.2f} [{low:.2f}, {high:.2f}], so {conclusion}."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the inverse of `DataCurve(**values)`."""
        return {
            "responses": self.responses,
            "gain": self.gain,
            "doubling": list(self.doubling),
        }


def data_curve(states: States | StateStore | str | os.PathLike, gae_lambda: float = 0.8) -> DataCurve:
    r"""
    Fit a linear V of the state (and of the rewards of the response so far, where there are any) and, to its
    differences, a static vector b on some of the prompts, and measure on others what b earns. Nothing is sampled: of
    the policy `π ∝ π0 exp(α w_yᵀ b)`, with `ℓ = Σ_t (w_y - w̄(h_t))ᵀ b` of a response, the reward rises by
    `α Cov(ℓ, r)` and the KL divergence is `α² Var(ℓ) / 2`, both up to higher terms in α. So at a small KL the gain is
    `√2 Cov(ℓ, r) / sd(ℓ) · √KL`. Cross-fitted in five folds of prompts; the states are read three times, a batch at a
    time. Every response counts with its reward, without a discount, also one that was cut off.

    Args:
        states:
            Episodes with directions, every state of them.
        gae_lambda (`float`, *optional*, defaults to 0.8):
            λ of b's targets, as for [`fit_advantage`].

    Returns:
        [`DataCurve`]. Several objectives count as their sum.

    Raises:
        `ValueError`: for states without directions, or not of every token; for fewer than 50 prompts, a reward that is
        no finite number, or an episode without a state.
    """
    store = StateStore.of(states)
    if not store.has_directions or store.read_at["every"] > 1:
        raise ValueError("A data curve needs directions, at every state: collect them with `directions`, `every=1`.")
    distinct, prompts = store.prompts.unique(return_inverse=True)
    if len(distinct) < MIN_PROMPTS:
        raise ValueError(f"A data curve needs {MIN_PROMPTS} prompts or more, there are {len(distinct)}.")
    if not torch.isfinite(store.rewards).all() or (store.lengths < 1).any():
        raise ValueError("A data curve needs a finite reward and a state at least of every episode.")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0))
    fold = (torch.empty_like(order).scatter_(0, order, torch.arange(len(order))) % _FOLDS)[prompts]
    rewards = store.rewards.double()
    rewards = ((rewards - rewards.mean(0)) / rewards.std(0).clamp_min(1e-12)).sum(-1)
    rewards = rewards / rewards.std().clamp_min(1e-12)
    # Which folds are fitted on, for each column: all sizes for the first fold, then for the second, ...
    fitted_on = torch.zeros(_FOLDS, _FOLDS * len(_SIZES), dtype=torch.float64)
    for column in range(fitted_on.shape[1]):
        measured, size = divmod(column, len(_SIZES))
        for other in range(_SIZES[size]):
            fitted_on[(measured + 1 + other) % _FOLDS, column] = 1
    values = _linear_values(store, fold, rewards, fitted_on)
    vectors = _static_vectors(store, fold, rewards, fitted_on, values, gae_lambda)
    scores, before = _scores(store, fold, values, vectors)
    earned = np.empty(scores.shape)
    for number in range(_FOLDS):
        own = (fold == number).numpy()
        spread = scores[own].std(0).clip(_TINY)
        earned[own] = math.sqrt(2) * scores[own] / spread * (rewards.numpy() - before)[own, None]
    counts = torch.bincount(fold, minlength=_FOLDS).double()
    return DataCurve(
        [round(float((counts @ fitted_on[:, size :: len(_SIZES)]).mean())) for size in range(len(_SIZES))],
        earned.mean(0).tolist(),
        _with_interval(earned[:, -1] - earned[:, -2], prompts.numpy()),
    )


def _batches(store: StateStore) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """
    (numbers of some episodes, of each of their states the number of its episode among them, and whether it is one of
    those that second moments are of).
    """
    generator = torch.Generator().manual_seed(0)
    share = _STATES_FOR_MOMENTS / store.num_states
    size = max(1, _BATCH // store.hidden_size // int(store.lengths.max()))
    for episodes in torch.arange(len(store)).split(size):
        inside = torch.repeat_interleave(torch.arange(len(episodes)), store.lengths[episodes])
        yield episodes, inside, torch.rand(len(inside), generator=generator) < share


def _read(store: StateStore, episodes: torch.Tensor) -> torch.Tensor:
    """What V reads of whole episodes, `(states, inputs)`, in float64."""
    return torch.cat([store.gather("hidden", episodes), store.prefix_rewards(episodes)], dim=1).double()


def _linear_values(
    store: StateStore, fold: torch.Tensor, rewards: torch.Tensor, fitted_on: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """V(x) = Wᵀ x + c of each column: weights `(inputs, columns)`, and constants, to the reward at all states."""
    prefixes = store.rewards.shape[1] if store.has_prefix_rewards else 0
    width = store.hidden_size + prefixes
    penalty = torch.full((width,), _VALUE_PENALTY, dtype=torch.float64)
    penalty[store.hidden_size :] = _PREFIX_PENALTY
    # Of each fold: Σ x xᵀ and Σ x r, for x what V reads and 1.
    squares, products = (torch.zeros(_FOLDS, width + 1, size, dtype=torch.float64) for size in (width + 1, 1))
    for episodes, inside, chosen in _batches(store):
        read, folds = _read(store, episodes), fold[episodes][inside]
        for number in folds.unique().tolist():
            rows = chosen & (folds == number)
            x = torch.cat([read[rows], torch.ones(int(rows.sum()), 1, dtype=torch.float64)], dim=1)
            squares[number] += x.T @ x
            products[number, :, 0] += x.T @ rewards[episodes][inside][rows]
    weights, constants = [], []
    for column in fitted_on.T:
        square, product = torch.tensordot(column, squares, 1), torch.tensordot(column, products, 1)[:, 0]
        count = square[-1, -1].clamp_min(1)
        mean, target = square[-1, :-1] / count, product[-1] / count
        covariance = square[:-1, :-1] / count - torch.outer(mean, mean)
        scale = covariance.diagonal().clamp_min(1e-12).sqrt()
        correlated = covariance / torch.outer(scale, scale) + torch.diag(penalty)
        weight = torch.linalg.solve(correlated, (product[:-1] / count - mean * target) / scale) / scale
        weights.append(weight)
        constants.append(target - mean @ weight)
    return torch.stack(weights, 1), torch.stack(constants)


def _static_vectors(
    store: StateStore,
    fold: torch.Tensor,
    rewards: torch.Tensor,
    fitted_on: torch.Tensor,
    values: tuple[torch.Tensor, torch.Tensor],
    gae_lambda: float,
) -> torch.Tensor:
    """The static vector of each column, `(hidden_size, columns)`, fitted to the differences of its V."""
    width, columns = store.hidden_size, fitted_on.shape[1]
    squares = torch.zeros(_FOLDS, width, width, dtype=torch.float64)
    products = torch.zeros(width, columns, dtype=torch.float64)
    share = min(1.0, _STATES_FOR_MOMENTS / store.num_states)
    for episodes, inside, chosen in _batches(store):
        directions = store.gather("directions", episodes).double()
        flat = _read(store, episodes) @ values[0] + values[1]
        lengths = store.lengths[episodes]
        targets = value_differences(
            pad_episodes(flat, lengths), rewards[episodes, None].expand(-1, columns), lengths, gae_lambda
        )[episode_mask(lengths)]
        folds = fold[episodes][inside]
        products += directions.T @ (targets * fitted_on[folds])
        for number in folds.unique().tolist():
            x = directions[chosen & (folds == number)]
            squares[number] += x.T @ x / share
    vectors = []
    for column, product in zip(fitted_on.T, products.T, strict=True):
        square = torch.tensordot(column, squares, 1)
        square.diagonal().add_(_VECTOR_PENALTY * square.diagonal().mean().clamp_min(_TINY))
        vectors.append(torch.linalg.solve(square, product))
    return torch.stack(vectors, 1)


def _scores(
    store: StateStore, fold: torch.Tensor, values: tuple[torch.Tensor, torch.Tensor], vectors: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """
    ℓ of each episode under the vectors of its own fold, `(episodes, sizes)`, and V of its first state by the largest
    fit: what of the reward the prompt alone explains.
    """
    sizes = len(_SIZES)
    scores = torch.zeros(len(store), sizes, dtype=torch.float64)
    before = torch.zeros(len(store), dtype=torch.float64)
    for episodes, inside, _ in _batches(store):
        directions = store.gather("directions", episodes).double()
        lengths, own = store.lengths[episodes], fold[episodes]
        summed = torch.zeros(len(episodes), store.hidden_size, dtype=torch.float64).index_add_(0, inside, directions)
        columns = own[:, None] * sizes + torch.arange(sizes)
        scores[episodes] = (summed @ vectors).gather(1, columns)
        first = _read(store, episodes)[lengths.cumsum(0) - lengths]
        before[episodes] = (first @ values[0] + values[1]).gather(1, columns[:, -1:])[:, 0]
    return scores.numpy(), before.numpy()


def _with_interval(earned: np.ndarray, prompts: np.ndarray) -> tuple[float, float, float]:
    """The mean over episodes and its interval by the jackknife, which leaves out all episodes of a prompt at once."""
    counts, sums = np.bincount(prompts), np.bincount(prompts, earned)
    without = (sums.sum() - sums) / (counts.sum() - counts)
    error = math.sqrt((len(counts) - 1) / len(counts) * float(((without - without.mean()) ** 2).sum()))
    mean = float(earned.mean())
    return mean, mean - _ENDS * error, mean + _ENDS * error
