"""The token bias in closed form: of what the static vector leaves of the targets, each token's mean, shrunken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data.states import StateStore

# So many states of a token, at which the targets are 0, are added to those that there are.
_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass
class TokenSums:
    """
    Of each token, over the states at which it was drawn.

    Args:
        count (`torch.Tensor` of shape `(vocabulary,)`):
            How many states there are.
        left (`torch.Tensor` of shape `(vocabulary,)`):
            The sum of what is left of their targets.
    """

    count: torch.Tensor
    left: torch.Tensor

    @classmethod
    def zeros(cls, size: int) -> TokenSums:
        """Of no states."""
        return cls(torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))

    def add(self, tokens: torch.Tensor, left: torch.Tensor) -> None:
        """Add states: the drawn tokens, and what is left of the targets, `(states,)` both."""
        self.count += torch.bincount(tokens, minlength=len(self.count))
        self.left.index_add_(0, tokens, left.double())

    def means(self, penalty: float) -> torch.Tensor:
        """Each token's shrunken mean, less their mean over the states, `(vocabulary,)`."""
        means = self.left / (self.count + penalty)
        return means - (self.count * means).sum() / self.count.sum().clamp(min=1)


def check_tokens(store: StateStore, size: int) -> None:
    """Raise `ValueError` if states do not hold the drawn tokens of a vocabulary of this size."""
    sizes = {part.vocabulary_size for part in store.parts}
    if not store.has_tokens or sizes != {size}:
        found = ", ".join(map(str, sorted(sizes - {None}))) or "no"
        raise ValueError(
            f"The head has a token bias of {size} tokens, the states are of {found} tokens: give "
            "`token_bias_size=states.vocabulary_size` in its ValueHeadConfig, or None, or collect them anew."
        )
    for part in store.parts:
        if len(part.tokens) and not 0 <= int(part.tokens.min()) <= int(part.tokens.max()) < size:
            raise ValueError(f"`tokens` must be ids from 0 to {size - 1}, got others: collect the states anew.")


def token_means(folds: Sequence[TokenSums]) -> torch.Tensor:
    """
    `c_y = Σ_{t: y_t = y} x_t / (n_y + ρ)`, less its mean over the drawn tokens, of what is left of the targets x_t:
    `(vocabulary,)`, in float32. ρ is the one with the smallest squared error in cross-validation over the folds; c is
    all zeros if none is better than that.
    """
    whole = TokenSums(sum(fold.count for fold in folds), sum(fold.left for fold in folds))
    best, smallest = torch.zeros_like(whole.left), 0.0
    for penalty in _PENALTIES:
        # But for what all have in common.
        error = 0.0
        for fold in folds:
            means = TokenSums(whole.count - fold.count, whole.left - fold.left).means(penalty)
            error += float((fold.count * means.square() - 2 * fold.left * means).sum())
        if error < smallest:
            best, smallest = whole.means(penalty), error
    return best.float()
