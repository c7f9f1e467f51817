"""Which rows of a batch follow which settings, and their edit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ...configuration import ControlConfig
from ...control.controller import Controller
from ...control.guards import guarded_logits
from ..request_settings import Asked


@dataclass(frozen=True)
class Kind:
    """Rows whose settings differ in step size and weights alone: these are edited together."""

    control: ControlConfig
    # `None`: all rows of the batch.
    rows: torch.Tensor | None
    # Both one value a row, `(rows, 1)`.
    step_size: torch.Tensor
    weights: dict[str, torch.Tensor]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor of all."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def put(self, tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A tensor of all rows with its own replaced."""
        return rows if self.rows is None else tensor.index_copy(0, self.rows, rows)


class Batch:
    """
    The requests of one engine's batch, row by row. vLLM's processor writes it, the layer reads it.

    Args:
        controller ([`Controller`]):
            Holds the heads.

    Attributes:
        is_attached (`bool`):
            Whether a layer reads it.
        is_due (`bool`):
            Whether the states of the rows are still to come in this step.
        size (`int`):
            How many rows there are.
    """

    def __init__(self, controller: Controller):
        self.controller = controller
        self.is_attached = self.is_due = False
        self.size = 0
        self._asked: dict[int, Asked] = {}
        self._kinds: list[Kind] | None = []

    def change(
        self,
        size: int,
        removed: Iterable[int],
        added: Iterable[tuple[int, Asked]],
        moved: Iterable[tuple[int, int, bool]],
    ) -> None:
        """
        Requests came and went.

        Args:
            size (`int`):
                How many rows there are now.
            removed (iterable of `int`), added (of `(int, Asked)`):
                Rows, and what they ask for.
            moved (iterable of `(int, int, bool)`):
                From where, to where, and whether both change places.
        """
        for row in removed:
            self._asked.pop(row, None)
        self._asked.update(added)
        for here, there, swap in moved:
            one, other = self._asked.pop(here, None), self._asked.pop(there, None)
            self._asked |= {there: one} if one is not None else {}
            self._asked |= {here: other} if swap and other is not None else {}
        self.size, self._kinds = size, None

    def take(self, states: torch.Tensor) -> list[Kind]:
        """
        The kinds of the rows of these states. Of one step the first states are those that tokens are drawn from;
        others (a prompt's, for its log-probabilities, or those of a rehearsal) are the base's.

        Raises:
            `RuntimeError`: if they cannot be the batch's.
        """
        if not self.is_due:
            return []
        self.is_due = False
        if len(states) != self.size:
            raise RuntimeError(
                f"vLLM asks for the logits of {len(states)} states in a batch of {self.size} requests: which state "
                "belongs to which request is not known in this mode, so it cannot be controlled."
            )
        return self.kinds(states.device)

    def kinds(self, device: torch.device) -> list[Kind]:
        """The batch by kinds of settings, made anew where requests came or went. Rows of the base are in none."""
        if self._kinds is None:
            groups = defaultdict(list)
            for row, asked in sorted(self._asked.items()):
                weights = {name: asked.weights[name] for name in self.controller.heads if asked.weights.get(name)}
                if row < self.size and asked.control is not False and not asked.control.is_identity and weights:
                    groups[replace(asked.control, step_size=0.0), tuple(weights)].append((row, asked))
            self._kinds = [self._kind(names, members, device) for (_, names), members in groups.items()]
        return self._kinds

    def _kind(self, names: tuple[str, ...], members: list[tuple[int, Asked]], device: torch.device) -> Kind:
        def column(values: Iterable[float]) -> torch.Tensor:
            return torch.tensor([[value] for value in values], dtype=torch.float32).to(device, non_blocking=True)

        rows = [row for row, _ in members]
        asked = [asked for _, asked in members]
        return Kind(
            control=max((one.control for one in asked), key=lambda control: control.step_size),
            rows=None if rows == list(range(self.size)) else torch.tensor(rows).to(device, non_blocking=True),
            step_size=column(one.control.step_size for one in asked),
            weights={name: column(one.weights[name] for one in asked) for name in names},
        )

    def edit(self, kind: Kind, states: torch.Tensor) -> torch.Tensor:
        """The edited states of a kind's rows, `(rows, width)`."""
        return self.controller.edit(states, kind.control, kind.step_size, kind.weights, clamp=True)

    def shift(self, kind: Kind, logits: torch.Tensor) -> torch.Tensor:
        """Logits of a kind's edited rows with the token bias of its heads, `(rows, vocabulary)`."""
        return self.controller.shifted(logits, kind.control, kind.step_size, kind.weights, clamp=True)

    @staticmethod
    def guard(kind: Kind, base: torch.Tensor, controlled: torch.Tensor) -> torch.Tensor:
        """Controlled logits of a kind's rows under its guards, `(rows, vocabulary)`."""
        return guarded_logits(base, controlled, kind.control.plausibility, kind.control.max_kl)
