"""Ridge regression in closed form, on moments that are streamed over batches and processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..data.processes import Processes, float64_device

# Penalties tried, relative to the largest eigenvalue of the inputs' second moment.
_PENALTIES = torch.logspace(-6, 2, 17, dtype=torch.float64)
# Share of a second moment below which a difference from it is rounding.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class Moments:
    """
    Means over rows of inputs x and targets y, in float64.

    Args:
        square (`torch.Tensor` of shape `(inputs, inputs)`), product (`torch.Tensor` of shape `(inputs, targets)`):
            `E[x xᵀ]` and `E[x yᵀ]`.
        x (`torch.Tensor` of shape `(inputs,)`), y (`torch.Tensor` of shape `(targets,)`):
            `E[x]` and `E[y]`.
        rounding (`float`, *optional*, defaults to 0.0):
            What of `square` may be rounding alone.
    """

    square: torch.Tensor
    product: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    rounding: float = 0.0

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple[torch.Tensor, torch.Tensor]],
        widths: tuple[int, int],
        device: torch.device,
        processes: Processes,
    ) -> Moments:
        """
        Those of the rows of all processes, each of which gives its share.

        Args:
            rows (iterable of tensors of shapes `(rows, inputs)` and `(rows, targets)`):
                The rows, in batches.
            widths (`(int, int)`):
                Inputs and targets.
            device (`torch.device`):
                Where to sum, if it knows float64.
        """
        exact = {"dtype": torch.float64, "device": float64_device(device)}
        inputs, targets = widths
        square, product = torch.zeros(inputs, inputs, **exact), torch.zeros(inputs, targets, **exact)
        x_sum, y_sum, count = torch.zeros(inputs, **exact), torch.zeros(targets, **exact), 0.0
        for batch in rows:
            # The device first: not every one knows float64.
            x, y = (values.to(square.device).double() for values in batch)
            square.addmm_(x.T, x)
            product.addmm_(x.T, y)
            x_sum += x.sum(0)
            y_sum += y.sum(0)
            count += len(x)
        count = processes.sum(torch.tensor(count, **exact))
        return cls(*(processes.sum(x) / count for x in (square, product, x_sum, y_sum)))

    def around(self, x: torch.Tensor, y: torch.Tensor) -> Moments:
        """Those of inputs and targets less these constants."""
        square = self.square - torch.outer(self.x, x) - torch.outer(x, self.x) + torch.outer(x, x)
        product = self.product - torch.outer(self.x, y) - torch.outer(x, self.y) + torch.outer(x, y)
        return Moments(square, product, self.x - x, self.y - y, _ROUNDING * float(self.square.diagonal().max()))


def ridge(train: Moments, held_out: Moments) -> torch.Tensor:
    """
    B of `min E‖y - Bᵀ x‖² + ρ‖B‖²` on the training moments, for each target with the ρ that is best on the held-out
    ones: `(inputs, targets)`, in float32.

    Raises:
        `ValueError`: if the inputs or targets hold values that are not finite.
    """
    for name, what in (("square", "states or directions"), ("product", "rewards or values")):
        if not all(torch.isfinite(getattr(moments, name)).all() for moments in (train, held_out)):
            raise ValueError(f"The {what} hold NaN or infinite values.")
    eigenvalues, basis = torch.linalg.eigh(train.square)
    largest = eigenvalues.max()
    if largest <= train.rounding:
        # Of inputs that are all the same, which explain nothing, rounding is left around their mean.
        return torch.zeros_like(train.product).float()
    projected = basis.T @ train.product
    penalties = largest * _PENALTIES
    solutions = [basis @ (projected / (eigenvalues.clamp(min=0) + penalty)[:, None]) for penalty in penalties]
    # The errors but for a constant.
    errors = [((held_out.square @ b - 2 * held_out.product) * b).sum(0) for b in solutions]
    best = torch.stack(errors).argmin(0)
    return torch.stack([solutions[number][:, target] for target, number in enumerate(best.tolist())], 1).float()
