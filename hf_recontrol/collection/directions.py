"""The directions `w_y - w̄`: what the advantage part is trained on, and the mean row w̄ in it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging

from .sampling import reshaped_by

logger = logging.get_logger(__name__)


def mean_rows(logits: torch.Tensor, temperature: float, weight: torch.Tensor) -> torch.Tensor:
    """
    The mean row w̄ = Σ_y π(y) w_y of the LM head under the policy.

    Args:
        logits (`torch.Tensor` of shape `(states, vocabulary)`):
            The model's own; π is their softmax at the temperature.
        temperature (`float`):
            0, as for greedy responses, is taken as 1.
        weight (`torch.Tensor` of shape `(vocabulary, hidden_size)`):
            The LM head's rows w_y.

    Returns:
        `torch.Tensor` of shape `(states, hidden_size)`, in float32.
    """
    logits = logits.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    return (torch.softmax(logits, dim=-1).to(weight.device, weight.dtype) @ weight).float()


def directions(token_ids: list[int], mean: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    `w_y - w̄` of drawn tokens.

    Args:
        token_ids (`list[int]`):
            The drawn tokens y.
        mean (`torch.Tensor` of shape `(tokens, hidden_size)`):
            w̄ of [`mean_rows`] for each.
        weight (`torch.Tensor` of shape `(vocabulary, hidden_size)`):
            The LM head's rows w_y.

    Returns:
        `torch.Tensor` of shape `(tokens, hidden_size)`, in float32.
    """
    return weight[torch.tensor(token_ids, device=weight.device, dtype=torch.long)].float() - mean


def warn_of_other_draws(generation_config: dict[str, Any], with_directions: bool) -> None:
    """Warn where w̄ is not that of the distribution which tokens are drawn from, if directions are read."""
    reshaped = reshaped_by(generation_config)
    if with_directions and reshaped:
        logger.warning(
            f"The responses are not drawn from the whole distribution ({', '.join(reshaped)}), but the advantage part "
            "is fitted as if they were: sample with a temperature alone for it."
        )
