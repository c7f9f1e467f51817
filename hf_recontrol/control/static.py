"""The static edit: one vector for all states, `u = b / τ`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..heads.value_head import ValueHead
from .method import ControlMethod
from .token_bias import check_token_bias, has_token_bias


def static_edit(vectors: Sequence[torch.Tensor], hidden: torch.Tensor, weights: Sequence, alpha) -> torch.Tensor:
    """
    `u = α Σ_k ω_k b_k` with `α = 1/τ`, the advantage edit of constant g_k: the logits are shifted by `W u`.

    Args:
        vectors (sequence of `torch.Tensor` of shape `(hidden_size,)`):
            The b_k.
        hidden (`torch.Tensor` of shape `(rows, hidden_size)`):
            The states. They say only how many edits there are.
        weights, alpha:
            As for [`ascend`].
    """
    edit = torch.zeros_like(hidden)
    for vector, omega in zip(vectors, weights, strict=True):
        edit = edit + omega * vector
    return alpha * edit


class Static(ControlMethod):
    """`α b`."""

    part = "its static vector"
    shifts_tokens = True

    def is_idle(self, head: ValueHead) -> bool:
        """Whether b and c are zero."""
        return not head.static_vector.any() and not has_token_bias(head)

    def check_module(self, head: nn.Module) -> None:
        """Raise `TypeError` if it has no tensor `static_vector`, `ValueError` if its shape is another; so with c."""
        vector, expected = getattr(head, "static_vector", None), (head.config.hidden_size,)
        if not isinstance(vector, torch.Tensor):
            raise TypeError(f"{type(head).__name__} has no tensor `static_vector`, which `method='static'` adds.")
        if vector.shape != expected:
            raise ValueError(
                f"`static_vector` of {type(head).__name__} has the shape {tuple(vector.shape)}, expected {expected}."
            )
        check_token_bias(head)

    def edit(self, heads, rows, weights, alpha, control, plan, eager) -> torch.Tensor:
        """By [`static_edit`]."""
        vectors = [head.static_vector.to(rows) for head in heads] if plan is None else [h.static for h in plan.heads]
        return static_edit(vectors, rows, weights, alpha)
