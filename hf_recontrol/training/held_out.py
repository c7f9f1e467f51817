"""Held-out prompts: which they are, and what V is worth on them: errors, correlations, calibration, baselines."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ..data.fingerprints import prompt_hashes
from ..data.prompts import Prompts
from ..data.states import StateStore
from ..settings import TrainingSettings

FIGURES_NAME = "training.json"
# Positions, as shares of a response, at which V is measured.
POSITIONS = tuple(round(0.1 * i, 1) for i in range(11))
# From this share of the constant's error on, V has found next to nothing.
_USELESS = 0.98
# Fewer held-out responses than this say little.
_FEW = 50


def split_by_prompt(prompts: torch.Tensor, validation_split: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Numbers of the training and the validation episodes; no prompt is in both. Held out are the prompts that come first
    in an order that depends on the seed and on each prompt alone, so other data with the same prompts hold out the
    same.

    Args:
        prompts (`torch.Tensor` of shape `(episodes,)`):
            The number of each episode's prompt.
        validation_split (`float`), seed (`int`):
            Share of the prompts to hold out, and what the choice depends on.

    Raises:
        `ValueError`: if one side would be empty.
    """
    distinct = prompts.unique()
    count = round(len(distinct) * validation_split)
    if not 0 < count < len(distinct):
        raise ValueError(
            f"{len(distinct)} prompts cannot be split with validation_split={validation_split}: at least one prompt "
            "is needed on each side."
        )
    order = np.argsort(_mixed(distinct.numpy().astype(np.uint64), seed), kind="stable")
    held_out = torch.isin(prompts, distinct[torch.from_numpy(order[:count])])
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def held_out_prompts(prompts: Prompts, store: StateStore, settings: TrainingSettings, most: int) -> Prompts:
    """
    Of some prompts those that were held out of a training on these states, each once; of more than `most`, so many at
    random: a file may hold one kind of prompt after the other.
    """
    _, episodes = split_by_prompt(store.prompts, settings.validation_split, settings.seed)
    wanted = set(store.prompts[episodes].tolist())
    chosen = []
    for index, number in enumerate(prompt_hashes(prompts)):
        if number in wanted:
            wanted.remove(number)
            chosen.append(index)
    if len(chosen) > most:
        chosen = sorted(random.Random(settings.seed).sample(chosen, most))
    return prompts.take(chosen)


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Numbers that look random, one for each: the finaliser of splitmix64 (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        x = numbers + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    a, b = a.double().flatten() - a.double().mean(), b.double().flatten() - b.double().mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def _steps(lengths: torch.Tensor) -> torch.Tensor:
    """Which states are at [`POSITIONS`]: `(episodes, len(POSITIONS))`."""
    return (torch.tensor(POSITIONS, device=lengths.device) * (lengths[:, None] - 1)).round().long()


def episode_summaries(
    values: torch.Tensor, rewards: torch.Tensor, lengths: torch.Tensor, discount: float = 1.0
) -> torch.Tensor:
    """
    What the figures need of each episode.

    Args:
        values (`torch.Tensor` of shape `(episodes, longest, objectives)`), rewards (`(episodes, objectives)`),
        lengths:
            Padded standardised values, standardised rewards, number of states.
        discount (`float`, *optional*, defaults to 1.0):
            γ: k states before the last one V stands for `γ^k` of the reward.

    Returns:
        `torch.Tensor` of shape `(episodes, len(POSITIONS) * objectives + 1)`: values at [`POSITIONS`], and the squared
        error summed over states and objectives.
    """
    at_positions = values.gather(1, _steps(lengths)[..., None].expand(-1, -1, values.shape[-1]))
    left = lengths[:, None] - 1 - torch.arange(values.shape[1], device=lengths.device)
    returns = rewards[:, None] * discount ** left.clamp(min=0)[..., None]
    squared = ((values - returns).square().sum(-1) * (left >= 0)).sum(1)
    return torch.cat([at_positions.flatten(1), squared[:, None]], dim=1)


def value_figures(
    summaries: torch.Tensor,
    rewards: torch.Tensor,
    lengths: torch.Tensor,
    prompts: torch.Tensor,
    reward_mean: torch.Tensor,
    reward_std: torch.Tensor,
    discount: float = 1.0,
) -> dict[str, Any]:
    """
    Figures of V on held-out episodes. Errors are mean squared errors to the final reward (discounted, if γ is below
    1), relative to those of the training episodes' mean reward (the constant baseline, 1).

    Args:
        summaries (`torch.Tensor`):
            Of [`episode_summaries`].
        rewards, lengths, prompts (`torch.Tensor`):
            Standardised rewards `(episodes, objectives)`, number of states, number of the prompt.
        reward_mean, reward_std (`torch.Tensor` of shape `(objectives,)`):
            The reward's units.
        discount (`float`, *optional*, defaults to 1.0):
            The γ that V was trained with, and the summaries made.

    Returns:
        `value_error` along the whole response, `value_error_last`, `correlation_first`, `correlation_last`,
        `by_position` (error and correlation at [`POSITIONS`]), `calibration` (predicted against realised reward, in
        the reward's own units, in bins of V at the last token; several objectives are summed in standardised units),
        `baselines` (`constant`, and `prompt_mean`: the mean reward of the prompt's other responses, or `None` where no
        prompt has two), `held_out_episodes`, `held_out_prompts`, `warnings`.
    """
    count, objectives = rewards.shape
    values = summaries[:, :-1].reshape(count, len(POSITIONS), objectives)
    returns = rewards[:, None] * discount ** (lengths[:, None] - 1 - _steps(lengths))[..., None]
    errors = (values - returns).square().sum((0, 2)) / returns.square().sum((0, 2)).clamp(min=1e-12)
    correlations = [correlation(values[:, i].sum(-1), returns[:, i].sum(-1)) for i in range(len(POSITIONS))]
    # Of all states of an episode, the sum of the squared discounts.
    weights = (discount ** (2 * torch.arange(int(lengths.max()), device=lengths.device))).cumsum(0)[lengths - 1]
    baselines = {"constant": 1.0, "prompt_mean": _leave_one_out_error(rewards, prompts)}
    figures = {
        "value_error": float(summaries[:, -1].sum() / (rewards.square().sum(-1) * weights).sum().clamp(min=1e-12)),
        "value_error_last": float(errors[-1]),
        "correlation_first": correlations[0],
        "correlation_last": correlations[-1],
        "held_out_episodes": count,
        "held_out_prompts": len(prompts.unique()),
        "by_position": [
            {"position": position, "error": float(error), "correlation": r}
            for position, error, r in zip(POSITIONS, errors, correlations, strict=True)
        ],
        "calibration": _calibration(values[:, -1], rewards, reward_mean, reward_std),
        "baselines": baselines,
    }
    return figures | {"warnings": _warnings(figures)}


def _leave_one_out_error(rewards: torch.Tensor, prompts: torch.Tensor) -> float | None:
    _, number = prompts.unique(return_inverse=True)
    counts = torch.bincount(number).to(rewards.dtype)[number]
    sums = torch.zeros(int(number.max()) + 1, rewards.shape[1], dtype=rewards.dtype).index_add(0, number, rewards)
    several = counts > 1
    if not several.any():
        return None
    others = (sums[number] - rewards)[several] / (counts[several, None] - 1)
    error = (others - rewards[several]).square().sum() / rewards[several].square().sum().clamp(min=1e-12)
    return float(error)


def _calibration(
    last: torch.Tensor, rewards: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
) -> list[dict[str, float]]:
    if rewards.shape[1] == 1:
        last, rewards = last * std + mean, rewards * std + mean
    predicted, realised = last.sum(-1), rewards.sum(-1)
    order = predicted.argsort(stable=True)
    bins = order.chunk(max(1, min(10, len(order) // 5)))
    return [
        {"predicted": float(predicted[b].mean()), "realised": float(realised[b].mean()), "count": len(b)} for b in bins
    ]


def _warnings(figures: dict[str, Any]) -> list[str]:
    warnings = []
    error, prompt_mean = figures["value_error_last"], figures["baselines"]["prompt_mean"]
    if error >= _USELESS:
        warnings.append(
            f"On held-out prompts V predicts the reward no better than its mean does (error {error:.2f} of the "
            "constant's at the last token). It cannot steer: use more prompts, or another reward."
        )
    elif prompt_mean is not None and error >= prompt_mean:
        warnings.append(
            f"V's error at the last token ({error:.2f}) is no smaller than that of the prompt's mean reward "
            f"({prompt_mean:.2f}): it tells prompts apart, not responses to one prompt, and that is what steers."
        )
    if figures["held_out_episodes"] < _FEW:
        warnings.append(
            f"Only {figures['held_out_episodes']} held-out responses: these figures mean little. Use more prompts, or "
            "a larger `validation_split`."
        )
    return warnings
