"""
Products of an ascent's steps that read less than the whole matrix: from one step to the next only some ReLUs flip, and
those that are off add nothing. Which those are is data, so all of this is for eager mode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .plan import HeadTensors

# Where more than this share of the units flip in one step, a whole product with G costs less than picking rows of it.
MANY_FLIPS = 0.1
# Beyond this share of units that are not zero, reading their rows alone is no gain; and where more than this share of
# the units are no longer among those whose rows lie together, they are put together anew.
_MOST_ACTIVE, _MANY_OTHERS = 0.8, 0.1
# How often they are, in an ascent: they drift in one direction, unless steps are too long.
_MOST_OFTEN = 8

# A product with a matrix of its argument, `(rows, in)` to `(rows, out)`.
Product = Callable[[torch.Tensor], torch.Tensor]


def of_few(matrix: torch.Tensor, left: torch.Tensor, rows: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """
    `left @ matrix` where `left`, `(rows, units)`, holds few numbers, at `rows` and `units`: sums of the matrix's rows,
    which are read once and copied nowhere.
    """
    if len(left) > 1:
        starts = torch.searchsorted(rows, torch.arange(len(left), device=rows.device))
    else:  # a part for each thread
        starts = torch.arange(0, len(units), -(-len(units) // torch.get_num_threads()), device=rows.device)
    sums = nn.functional.embedding_bag(units, matrix, starts, mode="sum", per_sample_weights=left[rows, units])
    return sums if len(left) > 1 else sums.sum(0, keepdim=True)


class Followed:
    """
    Products with a matrix of what changes in few places from one step to the next, as sign flips change it: kept up to
    date from the matrix's rows there.
    """

    def __init__(self, matrix: torch.Tensor):
        self.matrix = matrix
        self._left: torch.Tensor | None = None

    def __call__(self, left: torch.Tensor) -> torch.Tensor:
        """`left @ matrix`; not to be changed."""
        before, self._left = self._left, left
        if before is not None:
            difference = left - before
            rows, units = difference.nonzero(as_tuple=True)
            if len(units) <= MANY_FLIPS * difference.numel():
                if len(units) > 0:
                    self._product = self._product + of_few(self.matrix, difference, rows, units)
                return self._product
        self._product = left @ self.matrix
        return self._product


class Active:
    """
    Products with a matrix of a single row that ReLUs left zeros in, at nearly the same places from one step to the
    next: the matrix's rows at the other places are put together once and read alone.
    """

    def __init__(self, matrix: torch.Tensor):
        self.matrix = matrix
        self._units: torch.Tensor | None = None
        self._anew = 0

    def __call__(self, left: torch.Tensor) -> torch.Tensor:
        """`left @ matrix`."""
        if self._units is not None:
            others = left.index_fill(1, self._units, 0)
            rows, units = others.nonzero(as_tuple=True)
            if len(units) <= _MANY_OTHERS * left.numel():
                product = left[:, self._units] @ self._rows
                return product + of_few(self.matrix, others, rows, units) if len(units) > 0 else product
            # Signs that swing would have the rows put together at each step.
            self._anew += 1
        if self._anew > _MOST_OFTEN:
            return left @ self.matrix
        units = left[0].nonzero()[:, 0]
        if len(units) > _MOST_ACTIVE * left.numel():
            self._units = None
            return left @ self.matrix
        self._units, self._rows = units, self.matrix[units]
        return left[:, units] @ self._rows


def _times(matrix: torch.Tensor) -> Product:
    return lambda left: left @ matrix


def layer_products(head: HeadTensors, target: torch.Tensor | None, follows: bool, alone: bool) -> list:
    """
    Of each hidden layer after the first, `(a @ Wᵀ of activations a, d @ W of gradients d)`, each as a function. Of
    deep ReLU heads the gradient at the last activation changes with the signs there alone, so its product `follows`
    the flips; where a row is `alone`, the others read what is not zero.
    """
    products: list[tuple[Product, Product]] = []
    for place, (weight, _) in enumerate(head.layers[1:]):
        forward, backward = _times(weight.T), _times(weight)
        if head.columns is not None and alone:
            forward, backward = Active(head.columns[place]), Active(weight)
        if head.is_deep_relu and follows and target is None and place == len(head.layers) - 2:
            backward = Followed(weight)
        products.append((forward, backward))
    return products
