"""The hooks that edit or read the state where heads act, and the settings that they follow."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration import ControlConfig, ValueHeadConfig, check_numbers
from ..control.controller import DEFAULT_NAME, Controller
from ..heads.value_head import ValueHead
from .checks import check_not_idle
from .hook_points import find_decoder_layers, find_lm_head, hook_layer

# How much each head counts, by name: a number, or one for each prompt of the batch.
HeadWeights = Mapping[str, "float | tuple[float, ...]"]


def _keep(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The states whose logits are kept; `slice_logits_to_keep` of transformers, also for releases that lack it."""
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden[logits_to_keep]
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    if isinstance(logits_to_keep, int):
        logits_to_keep = slice(-logits_to_keep, None)
    return hidden[:, logits_to_keep, :]


def _put_back(hidden: torch.Tensor, edited: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """`hidden` with the states that [`_keep`] took replaced by `edited`."""
    if edited.shape == hidden.shape and isinstance(logits_to_keep, int):
        return edited
    result = hidden.clone()
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            result[logits_to_keep] = edited
        else:
            rows = torch.arange(len(hidden), device=hidden.device)[:, None]
            result[rows, logits_to_keep] = edited
        return result
    if isinstance(logits_to_keep, int):
        logits_to_keep = slice(-logits_to_keep, None)
    result[:, logits_to_keep] = edited
    return result


@dataclass
class _Forward:
    """One forward of the model in progress, from its pre-hook to its post-hook."""

    logits_to_keep: int | torch.Tensor
    # Whether the hook point was reached.
    edited: bool = False
    # Whether base and controlled states went on together, as a doubled batch.
    doubled: bool = False
    # Which of the states whose logits are kept are edited, where that differs by row.
    controlled: torch.Tensor | None = None


@dataclass
class _Call:
    """The settings of one generate call or one `with` block, in one thread."""

    # `None`: the settings of the model; `False`: no control.
    control: ControlConfig | bool | None = None
    # `None`: those of the model.
    weights: HeadWeights | None = None
    # How many rows beams or num_return_sequences made of each prompt.
    expansion: int = 1
    generating: bool = False


def checked_weights(weights: Mapping[str, float | Sequence[float]]) -> HeadWeights:
    """Weights as finite numbers and tuples of them.

    Raises:
        `TypeError`, `ValueError`: if they are none.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"The weights of heads must be a dict of name: weight, got {type(weights).__name__}.")
    if odd := [name for name in weights if not isinstance(name, str)]:
        raise TypeError(f"Heads are called by text, got {odd[0]!r}.")
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
                "`target` needs a weight of 0 or more: away from a target there is no place to arrive at."
            )
        if isinstance(head, ValueHead) and not head.config.head_sizes:
            largest = float(torch.linalg.matrix_norm(head.value_mlp.layers[0].weight.detach().float(), 2)) ** 2
            limit = 2 / max(max(weights) * largest + 2 * control.l2, 1e-30)
            if control.largest_step_size >= limit:
                raise ValueError(
                    f"`step_size` {control.largest_step_size:g} overshoots the target of this linear head further at "
                    f"each step: take one below {limit:.3g}."
                )


class ControlHooks:
    """
    The hooks that put a model under the control of a head, and the settings that they follow.

    Settings travel with the call in a `threading.local`, so that two threads can generate with different ones; it
    belongs to this object, so a controlled draft model does not take its target's. Neither a `ContextVar` nor a
    subclass of `threading.local` would do: `torch.compile` cannot trace the first and misses changes of the second.

    Args:
        model ([`~transformers.PreTrainedModel`]), head (`nn.Module`), config ([`ValueHeadConfig`]):
            Where to act, and what with. All must fit together: [`ReControlForCausalLM`] checks before.
        control ([`ControlConfig`]):
            The settings of calls that name none.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module, config: ValueHeadConfig, control: ControlConfig):
        self.controller = Controller(head)
        self.config = config
        self.control = control
        self.weights: HeadWeights = {DEFAULT_NAME: 1.0}
        self.layer = hook_layer(model, config)
        self.num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
        self.knows_logits_to_keep = model._supports_logits_to_keep()
        self.is_last_layer = self.layer is None or self.layer == len(find_decoder_layers(model)) - 1
        self._thread = threading.local()
        self._handles: list = []
        self.register(model)

    def __getstate__(self):
        call = getattr(self._thread, "call", None)
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

    def _target(self, model: PreTrainedModel) -> nn.Module:
        return find_lm_head(model) if self.layer is None else find_decoder_layers(model)[self.layer]

    def register(self, model: PreTrainedModel) -> None:
        """Add all hooks or, if one cannot be added, none."""
        handles = []
        try:
            handles.append(model.register_forward_pre_hook(self.begin_forward, with_kwargs=True))
            handles.append(model.register_forward_hook(self.end_forward, always_call=True))
            # First, so that transformers' own recording of hidden states sees the edited one.
            if self.layer is None:
                handles.append(self._target(model).register_forward_pre_hook(self.edit_head_input, prepend=True))
            else:
                handles.append(self._target(model).register_forward_hook(self.edit_layer_output, prepend=True))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise
        self._handles = handles

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _has_all_layers(self, model: PreTrainedModel) -> bool:
        """False while an early-exit draft runs the first layers only."""
        return getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None) == self.num_layers

    def follow(self, model: PreTrainedModel) -> None:
        """Move the hooks if the module they sat on has been replaced, as resizing embeddings or an adapter does."""
        if self.layer is not None and not self._has_all_layers(model):
            return
        target = self._target(model)
        hooks = target._forward_pre_hooks if self.layer is None else target._forward_hooks
        if self._handles[-1].id not in hooks:
            self.remove()
            self.register(model)

    @contextmanager
    def call(
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
        outer = getattr(self._thread, "call", None)
        if outer is not None:
            control = outer.control if control is None else control
            weights = outer.weights if weights is None else weights
        if control is not None or weights is not None:
            self.check(self.control if control is None else control, self.weights if weights is None else weights)
        self._thread.call = _Call(control, weights, generating=generating)
        try:
            if (active := self.active_control()) is not None:
                self.controller.refresh(tuple(self.active_weights()), active)
            yield
        finally:
            self._thread.call = outer
            # A KeyboardInterrupt reaches no post-hook.
            self._thread.forward = None

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
        if control.plausibility and not self.is_last_layer:
            raise ValueError(
                f"`plausibility` needs a head at the LM head or the last decoder layer, this one acts on layer "
                f"{self.layer}: later layers would have to run twice."
            )

    def nonzero(self, weights: HeadWeights) -> HeadWeights:
        """Those of the weights that are not 0, in some row at least, in the order of the heads."""
        given = {name: weights[name] for name in self.controller.heads if name in weights}
        return {name: w for name, w in given.items() if (any(w) if isinstance(w, tuple) else w)}

    def place(self, model: PreTrainedModel, config: ValueHeadConfig | None = None) -> str:
        """Where heads of `config`, by default this model's, act, in words."""
        layer = hook_layer(model, config or self.config)
        return "the LM head" if layer is None else f"decoder layer {layer}"

    def active_weights(self) -> HeadWeights:
        """The weights in force in this thread, of the heads that have any."""
        call = getattr(self._thread, "call", None)
        return self.nonzero(self.weights if call is None or call.weights is None else call.weights)

    def active_control(self) -> ControlConfig | None:
        """The settings in force in this thread, or `None` where the base is to be left alone."""
        call = getattr(self._thread, "call", None)
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
        with self.call(control):
            for name in self.by_row():
                raise ValueError(
                    f"A value for each prompt ({name}) cannot be had here, where batches are made by length: use one "
                    "for all."
                )

    def expand(self, batch_size: int, factor: int) -> None:
        """
        Tell that generate turned `batch_size` prompts into `factor` rows each, for settings that differ by row.

        Raises:
            `ValueError`: if there is not one value for each prompt.
        """
        call = getattr(self._thread, "call", None)
        if call is None:
            return
        for name, values in self.by_row().items():
            if len(values) != batch_size:
                raise ValueError(f"{name} holds {len(values)} values for {batch_size} prompts.")
        call.expansion = factor

    def _of_states(self, name: str, value: float | tuple[float, ...], hidden: torch.Tensor) -> float | torch.Tensor:
        """A setting for states of shape `(rows, positions, width)` or, flattened by a bool mask, `(states, width)`."""
        if not isinstance(value, tuple):
            return value
        forward, call = getattr(self._thread, "forward", None), getattr(self._thread, "call", None)
        values = torch.tensor(value, dtype=torch.float64).repeat_interleave(1 if call is None else call.expansion)
        flat = hidden.ndim == 2 and forward is not None and isinstance(forward.logits_to_keep, torch.Tensor)
        num_rows = len(forward.logits_to_keep) if flat else len(hidden)
        if len(values) != num_rows:
            raise ValueError(f"{name} holds {len(values)} values for {num_rows} rows.")
        return values[forward.logits_to_keep.nonzero()[:, 0].cpu()][:, None] if flat else values[:, None, None]

    def _edit(self, hidden: torch.Tensor, control: ControlConfig) -> torch.Tensor:
        """Edit states of shape (rows, positions, width) or, flattened by a bool mask, (states, width)."""
        if hidden.shape[-1] != self.config.hidden_size or hidden.ndim not in (2, 3):
            raise ValueError(
                f"At {self.config.hook_point!r} this model's states have shape {tuple(hidden.shape)}, the head reads "
                f"(batch, positions, {self.config.hidden_size}): this architecture cannot be controlled there."
            )
        step_size = self._of_states("`step_size`", control.step_size, hidden)
        weights = {
            name: self._of_states(f"the weight of {name!r}", weight, hidden)
            for name, weight in self.active_weights().items()
        }
        forward = getattr(self._thread, "forward", None)
        if forward is not None:
            forward.edited = True
            moved = step_size * sum(map(abs, weights.values()))
            forward.controlled = moved != 0 if isinstance(moved, torch.Tensor) else None
        call = getattr(self._thread, "call", None)
        return self.controller.edit(
            hidden,
            control,
            step_size,
            weights,
            check_states=call is not None and call.generating,
            prepared=call is not None,
        )

    def _with_base(self, base: torch.Tensor, controlled: torch.Tensor, control: ControlConfig) -> torch.Tensor:
        """What goes on through the model: the controlled states, or base and controlled ones as a doubled batch."""
        if not control.plausibility:
            return controlled
        forward = getattr(self._thread, "forward", None)
        if forward is None:
            raise RuntimeError(
                "`plausibility` compares base and controlled logits behind the model's forward: call `model(...)`, "
                "not `model.forward(...)` or a part of the model."
            )
        forward.doubled = True
        return torch.cat([base, controlled])

    def begin_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Pre-hook of the model: note which positions' logits are kept."""
        logits_to_keep = kwargs.get("logits_to_keep", 0)
        call = getattr(self._thread, "call", None)
        if not self.is_last_layer and not self.knows_logits_to_keep and call is not None and call.generating:
            logits_to_keep = 1  # what generate would have asked for
        self._thread.forward = _Forward(0 if logits_to_keep is None else logits_to_keep)
        control = self.active_control()
        if control is None or not control.plausibility:
            return None
        if kwargs.get("labels") is not None:
            raise ValueError(
                "`plausibility` masks tokens, so the loss of `labels` could be infinite: compute it from the logits, "
                "or set `plausibility=0` for this call."
            )
        if self.layer is not None and isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
            # The model slices the doubled batch, so it needs the positions of both halves.
            return args, {**kwargs, "logits_to_keep": torch.cat([logits_to_keep, logits_to_keep])}
        return None

    def edit_layer_output(self, layer: nn.Module, args: tuple, output: Any):
        """Post-hook of a decoder layer: edit the states whose logits are kept."""
        control = self.active_control()
        if control is None:
            return None
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        forward = getattr(self._thread, "forward", None)
        logits_to_keep = 0 if forward is None else forward.logits_to_keep
        edited = _put_back(hidden, self._edit(_keep(hidden, logits_to_keep), control), logits_to_keep)
        edited = self._with_base(hidden, edited, control)
        return type(output)([edited, *output[1:]]) if isinstance(output, (tuple, list)) else edited

    def edit_head_input(self, lm_head: nn.Module, args: tuple):
        """Pre-hook of the LM head: edit all states that reach it."""
        control = self.active_control()
        if control is None:
            return None
        return (self._with_base(args[0], self._edit(args[0], control), control), *args[1:])

    def end_forward(self, model: nn.Module, args: tuple, output: Any):
        """Post-hook of the model, called also when its forward fails: split a doubled batch and mask."""
        forward = getattr(self._thread, "forward", None)
        self._thread.forward = None
        control = self.active_control()
        if forward is None or output is None or control is None:
            return None
        if not forward.edited and self._has_all_layers(model):
            raise RuntimeError(
                "Control did not reach its hook point: the module there has been replaced since the head was "
                "attached. `generate` follows such a change; for other calls `unload()` the head and attach it again."
            )
        if not forward.doubled:
            return None
        logits = output[0] if isinstance(output, tuple) else output.logits
        base, logits = logits.chunk(2)
        base = base.float()
        implausible = base < base.amax(-1, keepdim=True) + math.log(control.plausibility)
        if forward.controlled is not None:
            # A row of step size 0 is the base's.
            implausible &= forward.controlled.to(implausible.device)
        logits = logits.masked_fill(implausible, -math.inf)
        if isinstance(output, tuple):
            return (logits, *output[1:])
        output.logits = logits
        if self.layer is not None and output.get("hidden_states") is not None:
            *earlier, last = output.hidden_states
            output.hidden_states = (*earlier, last.chunk(2)[1])
        return output


@contextmanager
def read_states(
    model: PreTrainedModel, config: ValueHeadConfig, keep_logits: bool = False
) -> Iterator[list[torch.Tensor]]:
    """
    Collect the states at a hook point, of shape `(batch, positions, width)`, one tensor for each forward in the block.

    Unless `keep_logits`, the LM head is handed one position only where it is the hook point, so that a long forward
    makes no vocabulary-sized tensor for each position: then the logits of forwards inside the block are of no use.
    Under control the states are those before the edit. At the LM head only the positions of `logits_to_keep` are seen.
    Forwards of other threads are left alone.
    """
    states: list[torch.Tensor] = []
    layer = hook_layer(model, config)
    reader = threading.get_ident()
    if layer is None:

        def read_head_input(module, args):
            if threading.get_ident() != reader:
                return None
            states.append(args[0])
            return None if keep_logits else (args[0][:, :1], *args[1:])

        # First, so that what is read is the base's state, also under control.
        handle = find_lm_head(model).register_forward_pre_hook(read_head_input, prepend=True)
    else:

        def read_layer_output(module, args, output):
            if threading.get_ident() == reader:
                states.append(output[0] if isinstance(output, (tuple, list)) else output)

        handle = find_decoder_layers(model)[layer].register_forward_hook(read_layer_output, prepend=True)
    try:
        yield states
    finally:
        handle.remove()
