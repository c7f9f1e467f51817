"""The advantage edit: one step in closed form, `u = g(h) / τ`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..heads.value_head import ValueHead
from .method import ControlMethod
from .plan import Plan
from .token_bias import check_token_bias, has_token_bias


def advantage_edit(plan: Plan, hidden: torch.Tensor, weights: Sequence, alpha) -> torch.Tensor:
    """
    `u = α Σ_k ω_k g_k(h)` with `α = 1/τ`: then `softmax(W (h + u))` is the optimum of `E[A] - τ KL(π ‖ π0)` for the
    advantage `A(h, y) = (w_y - E_π0[w])ᵀ Σ_k ω_k g_k(h)`.

    Args:
        plan ([`Plan`]):
            Of the heads.
        hidden (`torch.Tensor` of shape `(rows, hidden_size)`):
            The states.
        weights, alpha:
            As for [`ascend`].
    """
    edit = torch.zeros_like(hidden)
    for head, omega in zip(plan.heads, weights, strict=True):
        *layers, (weight, bias) = head.advantage
        x = head.scaled(hidden)
        for w, b in layers:
            x = head.activation(torch.addmm(b, x, w.T))
        edit = edit + omega * torch.addmm(bias, x, weight.T)
    return alpha * edit


class Advantage(ControlMethod):
    """`α g(h)` in one step."""

    part = "the last layer of its advantage part"
    shifts_tokens = True

    def is_idle(self, head: ValueHead) -> bool:
        """Whether g and c are zero. The bias of g's last layer is its constant part."""
        last = head.advantage_mlp.layers[-1]
        return not last.weight.any() and not last.bias.any() and not has_token_bias(head)

    def check_module(self, head: nn.Module) -> None:
        """Raise `TypeError` if it has no method `advantage`; also as [`check_token_bias`]."""
        if not callable(getattr(head, "advantage", None)):
            raise TypeError(f"{type(head).__name__} has no method `advantage`, which `method='advantage'` calls.")
        check_token_bias(head)

    def edit(self, heads, rows, weights, alpha, control, plan, eager) -> torch.Tensor:
        """By [`advantage_edit`]; of any modules by their method `advantage`."""
        if plan is not None:
            return advantage_edit(plan, rows, weights, alpha)
        return alpha * sum(
            weight * head.advantage(rows.to(next(head.parameters(), rows).dtype)).to(rows.dtype)
            for head, weight in zip(heads, weights, strict=True)
        )
