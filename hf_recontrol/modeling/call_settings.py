"""Which control and which weights are in force: those of the model, or those of a call, which belong to its thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration import ControlConfig
from ..control.controller import DEFAULT_NAME, Controller
from ..heads.value_head import ValueHead
from ..utils.checks import check_numbers
from .checks import check_not_idle
from .hook_points import HookPoint

# How much each head counts, by name: a number, or one for each prompt of the batch.
HeadWeights = Mapping[str, "float | tuple[float, ...]"]


@dataclass
class Call:
    """The settings of one generate call or one `with` block, in one thread."""

    # `None`: the settings of the model; `False`: no control.
    control: ControlConfig | bool | None = None
    # `None`: those of the model.
    weights: HeadWeights | None = None
    # How many rows beams or num_return_sequences made of each prompt.
    expansion: int = 1
    generating: bool = False
    # Whether the model has run: what then calls its LM head alone makes drafts, or contrasts of layers.
    has_run: bool = False
    # Whether drafts are verified, or made: then processors also see positions from which nothing is drawn.
    has_drafts: bool = False
    # Whether the model's own first layers make its drafts, and whether it is the call in which they make one.
    has_early_exits: bool = False
    is_early_exit: bool = False


def checked_weights(weights: Mapping[str, float | Sequence[float]]) -> HeadWeights:
    """Weights as finite numbers and tuples of them.

    Raises:
        `TypeError`, `ValueError`: if they are none.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"The weights of heads must be a dict of name: weight, got {type(weights).__name__}.")
    if odd := [name for name in weights if not isinstance(name, str)]:
        raise TypeError(f"Head names must be strings, got {odd[0]!r}.")
    return {name: check_numbers(f"the weight of {name!r}", weight, "prompt") for name, weight in weights.items()}


def _check_target(control: ControlConfig, active: Mapping[str, tuple[nn.Module, float | tuple[float, ...]]]) -> None:
    """Raise `ValueError` if steps towards the target are known not to arrive."""
    if len(active) > 1:
        raise ValueError(
            f"`target` is for the values of one head, {len(active)} act: set the weights of the others to 0."
        )
    for head, weight in active.values():
        weights = weight if isinstance(weight, tuple) else (weight,)
        if min(weights) < 0:
            raise ValueError(
                "`target` needs a weight of 0 or more: a negative weight would lead away from the target, to nowhere."
            )
        if isinstance(head, ValueHead) and not head.config.head_sizes:
            largest = float(torch.linalg.matrix_norm(head.value_mlp.layers[0].weight.detach().float(), 2)) ** 2
            limit = 2 / max(max(weights) * largest + 2 * control.l2, 1e-30)
            if control.largest_step_size >= limit:
                raise ValueError(
                    f"`step_size` {control.largest_step_size:g} overshoots the target of this linear head further at "
                    f"each step: take one below {limit:.3g}."
                )


class CallSettings:
    """
    The control and the head weights in force.

    Settings travel with the call in a `threading.local`, so that two threads can generate with different ones; it
    belongs to this object, so a controlled draft model does not take its target's. Neither a `ContextVar` nor a
    subclass of `threading.local` would do: `torch.compile` cannot trace the first and misses changes of the second.

    Args:
        controller ([`Controller`]):
            Holds the heads.
        hook_point ([`HookPoint`]):
            Where they act.
        control ([`ControlConfig`]):
            The settings of calls that name none.
    """

    def __init__(self, controller: Controller, hook_point: HookPoint, control: ControlConfig):
        self.controller, self.hook_point, self.control = controller, hook_point, control
        self.weights: HeadWeights = {DEFAULT_NAME: 1.0}
        self._thread = threading.local()

    def __getstate__(self):
        call = self.current
        if call is not None and (call.control is not None or call.weights is not None):
            # A copy, or another process, would not know of them and do something else without a word.
            raise RuntimeError(
                "A model cannot be copied or pickled inside `disable_control()` or a call with settings of its own: "
                "they belong to this thread. Copy it outside; in a function that another process runs, or whose "
                "result `datasets` caches, call `generate(..., control=False)`."
            )
        return {key: value for key, value in self.__dict__.items() if key != "_thread"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._thread = threading.local()

    @property
    def current(self) -> Call | None:
        """The innermost call or block of this thread, if it is in one."""
        return getattr(self._thread, "call", None)

    @contextmanager
    def use(
        self,
        control: ControlConfig | bool | None,
        weights: Mapping[str, float | Sequence[float]] | None = None,
        generating: bool = False,
    ) -> Iterator[None]:
        """
        Settings for the forwards inside the block, in this thread. `None` keeps those of an enclosing block.

        Raises:
            `TypeError`, `ValueError`: if the heads cannot do what `control` and `weights` ask for.
        """
        weights = None if weights is None else checked_weights(weights)
        outer = self.current
        if outer is not None:
            control = outer.control if control is None else control
            weights = outer.weights if weights is None else weights
        if control is not None or weights is not None:
            self.check(self.control if control is None else control, self.weights if weights is None else weights)
        is_early_exit = generating and outer is not None and outer.has_early_exits
        self._thread.call = Call(control, weights, generating=generating, is_early_exit=is_early_exit)
        try:
            if (active := self.active_control()) is not None:
                self.controller.refresh(tuple(self.active_weights()), active)
            yield
        finally:
            self._thread.call = outer

    def check(self, control: ControlConfig | bool, weights: HeadWeights) -> None:
        """
        Raise `TypeError` or `ValueError` if these heads, at this hook point, cannot do what `control` asks for
        (`False`: nothing).
        """
        if unknown := sorted(weights.keys() - self.controller.heads.keys()):
            raise ValueError(f"This model has no head {unknown}, it has {sorted(self.controller.heads)}.")
        if control is False:
            return
        if not isinstance(control, ControlConfig):
            raise TypeError(f"`control` must be a ControlConfig, False or None, got {type(control).__name__}.")
        active = self.nonzero(weights)
        for name in active:
            head = self.controller.heads[name]
            head.config.check_control(control)
            check_not_idle(head, control)
        if control.target is not None:
            _check_target(control, {name: (self.controller.heads[name], weight) for name, weight in active.items()})
        if control.is_guarded and not self.hook_point.is_last:
            raise ValueError(
                "`plausibility` and `max_kl` need a head at the LM head or the last decoder layer, this one acts on "
                f"layer {self.hook_point.layer}: later layers would have to run twice."
            )

    def nonzero(self, weights: HeadWeights) -> HeadWeights:
        """Those of the weights that are not 0, in some row at least, in the order of the heads."""
        given = {name: weights[name] for name in self.controller.heads if name in weights}
        return {name: w for name, w in given.items() if (any(w) if isinstance(w, tuple) else w)}

    def active_weights(self) -> HeadWeights:
        """The weights in force in this thread, of the heads that have any."""
        call = self.current
        return self.nonzero(self.weights if call is None or call.weights is None else call.weights)

    def active_control(self) -> ControlConfig | None:
        """The settings in force in this thread, or `None` where the base is to be left alone."""
        call = self.current
        control = self.control if call is None or call.control is None else call.control
        return None if control is False or control.is_identity or not self.active_weights() else control

    def by_row(self) -> dict[str, tuple[float, ...]]:
        """The settings in force that hold one value for each prompt, by name."""
        control = self.active_control()
        if control is None:
            return {}
        settings = {"`step_size`": control.step_size}
        settings |= {f"the weight of {name!r}": weight for name, weight in self.active_weights().items()}
        return {name: value for name, value in settings.items() if isinstance(value, tuple)}

    def check_same_for_all(self, control: ControlConfig | bool | None) -> None:
        """Raise `ValueError` if settings hold one value for each prompt, where batches are no order of prompts."""
        with self.use(control):
            for name in self.by_row():
                raise ValueError(
                    f"A value for each prompt ({name}) cannot be used here, where batches are made by length: give "
                    "one value for all prompts."
                )

    def expand(self, batch_size: int, factor: int) -> None:
        """
        Tell that generate turned `batch_size` prompts into `factor` rows each, for settings that differ by row.

        Raises:
            `ValueError`: if there is not one value for each prompt.
        """
        call = self.current
        if call is None:
            return
        for name, values in self.by_row().items():
            if len(values) != batch_size:
                raise ValueError(f"{name} holds {len(values)} values for {batch_size} prompts.")
        call.expansion = factor
