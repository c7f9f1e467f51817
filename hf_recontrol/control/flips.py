"""
The ascent up V of one hidden ReLU layer, many steps at a time. Exact.

There `δ = w₂ ⊙ 1[z > 0]`, so that the steps of `z ← z + α δ G` are a straight line until a unit flips, that is, until its
z changes sign. Few units can flip soon: those near zero, or that flipped just now, since units at a kink of V go to and
fro. Over the next steps these *watched* units S are followed alone, by their own block of G:
`z_S ← z_S + α (δ G)_S`, with the δ of all others as it is. Then all units' z at all of these steps come from one product,
with the rows of G of those that flipped. Where an unwatched unit has flipped, what comes after is not used: the steps go on
from there, and it is watched. A row of G is so read once in many steps instead of at each flip.
"""

from __future__ import annotations

import torch

# Steps looked ahead: at most so many, which bounds the memory, and at least so many if there are as many left.
_LONGEST, _SHORTEST = 32, 4
# Units watched at most, if this is not more than half of them: the block of G stays in a core's cache.
_WATCHED = 512
# A unit is watched that would reach zero within so many times the steps looked ahead, at its present speed.
_MARGIN = 1.3
# ... or that flipped within the last so many steps.
_RECENT = 40
# Bytes of the rows of G that the watched units of several states need: as many states go together.
_BYTES = 2**24
_NEVER = 2**30


def ascend_by_flips(
    gram: torch.Tensor,
    slopes: torch.Tensor,
    z: torch.Tensor,
    alpha: float | torch.Tensor,
    decay: float | torch.Tensor,
    num_steps: int,
) -> torch.Tensor:
    """
    The coefficients `c ← decay c + α δ` after `num_steps` steps of `z ← z₀ + c G`, `(rows, units)`.

    Which units flip is data, so this is for eager mode.

    Args:
        gram (`torch.Tensor` of shape `(units, units)`):
            G, symmetric.
        slopes (`torch.Tensor` of shape `(units,)` or `(rows, units)`):
            w₂: δ where a unit's z is above zero.
        z (`torch.Tensor` of shape `(rows, units)`):
            The first pre-activations; infinite for units that never flip.
        alpha, decay (`float` or `torch.Tensor` of shape `(rows, 1)`):
            α, and what shrinks the edit at each step.
    """
    together = max(1, _BYTES // (min(_WATCHED, len(gram)) * len(gram) * gram.element_size()))

    def of(value: float | torch.Tensor, rows: slice) -> float | torch.Tensor:
        return value[rows] if isinstance(value, torch.Tensor) and value.ndim == 2 else value

    parts = [slice(first, first + together) for first in range(0, len(z), together)]
    return torch.cat(
        [_ascend(gram, of(slopes, rows), z[rows], of(alpha, rows), of(decay, rows), num_steps) for rows in parts]
    )
