"""What every control method gives the controller."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from ..configuration import ControlConfig
from ..heads.value_head import ValueHead
from .plan import Plan


def may_wait(device: torch.device) -> bool:
    """
    Whether code may wait for a device to know what it computed, and so depend on the data: not where it is traced, nor
    where its kernels are recorded in a CUDA graph.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


class ControlMethod(ABC):
    """
    A way from states h to their edits u. One object of each stands in `METHODS` of controller.py, by the name that
    [`ControlConfig`] has for it.

    Attributes:
        part (`str`):
            What of a head must not be zero, in messages.
        needs_gram (`bool`):
            Whether its plans hold the Gram matrix of V's first layers.
        shifts_tokens (`bool`):
            Whether the heads' token bias goes with it.
    """

    part: str
    needs_gram = False
    shifts_tokens = False

    @abstractmethod
    def is_idle(self, head: ValueHead) -> bool:
        """Whether a head's edit is zero whatever the state, as that of an untrained part is."""

    def check_module(self, head: nn.Module) -> None:  # noqa: B027 (most methods call what every head has)
        """Raise `TypeError` if a module that is no [`ValueHead`] lacks what the method calls."""

    @abstractmethod
    def edit(
        self,
        heads: Sequence[nn.Module],
        rows: torch.Tensor,
        weights: Sequence,
        alpha: float | torch.Tensor,
        control: ControlConfig,
        plan: Plan | None,
        eager: bool,
    ) -> torch.Tensor:
        """
        u of states.

        Args:
            heads (sequence of `nn.Module`):
                The heads that act.
            rows (`torch.Tensor` of shape `(rows, hidden_size)`):
                The states, in the compute dtype.
            weights (sequence of `float` or `torch.Tensor` of shape `(rows, 1)`):
                ω of each head; all of one kind.
            alpha (`float` or `torch.Tensor` of shape `(rows, 1)`):
                The step size.
            control ([`ControlConfig`]):
                The other settings.
            plan ([`Plan`] or `None`):
                The heads' tensors, in the dtype of `rows`; `None` for heads that are any modules, to be called.
            eager (`bool`):
                Whether what is done may depend on the data ([`may_wait`]).

        Returns:
            `torch.Tensor` of the shape of `rows`.
        """
