"""The token bias: what the advantage edit and the static one add to the logits behind the LM head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def token_bias_of(head: nn.Module) -> torch.Tensor | None:
    """c of a head, `(vocabulary,)`, or `None`: its configuration says whether there is one."""
    return None if head.config.token_bias_size is None else head.token_bias


def check_token_bias(head: nn.Module) -> None:
    """
    Of a module that is no [`ValueHead`] and whose configuration has a token bias: raise `TypeError` if it has no
    tensor `token_bias`, `ValueError` if that is of another shape.
    """
    expected = head.config.token_bias_size
    if expected is None:
        return
    bias = getattr(head, "token_bias", None)
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"{type(head).__name__} has no tensor `token_bias`, which its `config.token_bias_size` names.")
    if bias.shape != (expected,):
        raise ValueError(
            f"`token_bias` of {type(head).__name__} has the shape {tuple(bias.shape)}, expected ({expected},)."
        )


def has_token_bias(head: nn.Module) -> bool:
    """Whether a head has a token bias that is not all zeros."""
    bias = token_bias_of(head)
    return bias is not None and bool(bias.any())


def token_shift(
    biases: Sequence[torch.Tensor | None],
    weights: Sequence[float | torch.Tensor],
    alpha: float | torch.Tensor,
    size: int,
) -> torch.Tensor:
    """
    `α Σ_k ω_k c_k`, what is added to the logits of `size` tokens: `(size,)` or, where α or a weight differs by state,
    with the shape of these before it. Tokens that were added to the vocabulary behind those of c_k have 0.

    Beside the edit `u = α g(h)` of the state the policy is then `π ∝ π0 exp(α (w_yᵀ g(h) + c_y))`, the optimum of
    `E[A] - τ KL(π ‖ π0)` for `A(h, y) = (w_y - E_π0[w])ᵀ g(h) + c_y - E_π0[c]` and `α = 1/τ`.

    Args:
        biases (sequence of `torch.Tensor` of shape `(vocabulary,)` or `None`):
            The c_k.
        weights (sequence of `float` or `torch.Tensor` of shape `(..., 1)`), alpha (the same):
            The ω_k, and the step size.
    """
    known = [(bias, omega) for bias, omega in zip(biases, weights, strict=True) if bias is not None]
    return alpha * sum(omega * nn.functional.pad(bias, (0, size - len(bias))) for bias, omega in known)
