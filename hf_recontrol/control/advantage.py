"""The advantage edit: one step in closed form, `u = g(h) / τ`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .plan import Plan


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
