"""The hooks that edit the state where heads act, from one forward's start to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..configuration import ControlConfig
from ..control.controller import Controller
from ..control.guards import guarded_logits
from .call_settings import CallSettings
from .hook_points import HookPoint


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


def _controlled_half(states: Any, num_rows: int) -> Any:
    """One part of a model's output: those of the hidden states that are of a doubled batch, of its second half."""
    if not isinstance(states, tuple):
        return states
    # Hidden states that were not asked for are `None`, and attentions have another dimension.
    doubled = [isinstance(x, torch.Tensor) and (x.ndim, len(x)) == (3, 2 * num_rows) for x in states]
    return tuple(x[num_rows:] if is_doubled else x for x, is_doubled in zip(states, doubled, strict=True))


@dataclass
class _Forward:
    """One forward of the model in progress, from its pre-hook to its post-hook."""

    logits_to_keep: int | torch.Tensor
    # Whether the hook point was reached.
    edited: bool = False
    # Rows of base states that went on together with as many controlled ones, as a doubled batch.
    doubled: int = 0
    # Which of the states whose logits are kept are edited, where that differs by row.
    controlled: torch.Tensor | None = None


class ControlHooks:
    """
    The hooks that put a model under the control of heads.

    Args:
        model ([`~transformers.PreTrainedModel`]), head (`nn.Module`), hook_point ([`HookPoint`]):
            What is controlled, what with, and where. All must fit together: [`ReControlForCausalLM`] checks before.
        control ([`ControlConfig`]):
            The settings of calls that name none.

    Attributes:
        settings ([`CallSettings`]):
            Which control and which weights the hooks follow.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module, hook_point: HookPoint, control: ControlConfig):
        self.settings = CallSettings(Controller(head), hook_point, control)
        self.knows_logits_to_keep = model._supports_logits_to_keep()
        self._thread = threading.local()
        # On the model, and on the module at the hook point.
        self._handles: list[RemovableHandle] = []
        self._handles_there: list[RemovableHandle] = []
        # Where the hooked layer is in the model.
        self._path = ""
        # A copy of a hooked module alone drags a copy of these hooks along, which no model takes into use.
        self.in_use = True
        self.register(model)

    def __getstate__(self):
        kept = {key: value for key, value in self.__dict__.items() if key != "_thread"} if self.in_use else {}
        return kept | {"in_use": False}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._thread = threading.local()

    @property
    def hook_point(self) -> HookPoint:
        """Where the heads act."""
        return self.settings.hook_point

    @property
    def forward(self) -> _Forward | None:
        """The forward of the model that is in progress in this thread."""
        return getattr(self._thread, "forward", None)

    def register(self, model: PreTrainedModel) -> None:
        """Add all hooks or, if one cannot be added, none."""
        try:
            self._handles.append(model.register_forward_pre_hook(self.begin_forward, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self.end_forward, always_call=True))
            self._register_at_hook_point(model)
        except BaseException:
            self.remove()
            raise

    def _register_at_hook_point(self, model: PreTrainedModel) -> None:
        module = self.hook_point.module
        # What quantises a module may carry our hooks over to the new one.
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [number for number, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[number]
        # First, so that transformers' own recording of hidden states sees the edited one.
        if self.hook_point.layer is None:
            self._handles_there.append(module.register_forward_pre_hook(self.edit_head_input, prepend=True))
            # Behind others, which may put together the logits of several devices.
            self._handles_there.append(module.register_forward_hook(self.shift_logits))
            return
        self._path = next(name for name, part in model.named_modules() if part is module)
        self._handles_there.append(module.register_forward_hook(self.edit_layer_output, prepend=True))

    def _hooks_of(self, module: nn.Module) -> dict[int, Callable]:
        """The hooks of a module among which ours is, if it is at the hook point."""
        return module._forward_pre_hooks if self.hook_point.layer is None else module._forward_hooks

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in (*self._handles, *self._handles_there):
            handle.remove()
        self._handles, self._handles_there = [], []

    def _lacks_last_layers(self, model: PreTrainedModel) -> bool:
        """Whether the configuration counts the first of the decoder layers only: the others are still there."""
        if self.hook_point.layer is None:
            return False
        try:
            layers = model.get_submodule(self._path.rpartition(".")[0])
        except AttributeError:  # replaced, as a whole
            return False
        return model.config.get_text_config(decoder=True).num_hidden_layers < len(layers)

    def _is_in_place(self, model: PreTrainedModel) -> bool:
        """Whether our hook is on the module that is at the hook point now; found without a search."""
        if self.hook_point.layer is None:
            module = model.get_output_embeddings()
        else:
            try:
                module = model.get_submodule(self._path)
            except AttributeError:
                return False
        hook = None if module is None else self._hooks_of(module).get(self._handles_there[0].id)
        # A copy of a module has hooks of the same number.
        return getattr(hook, "__self__", None) is self

    def follow(self, model: PreTrainedModel) -> None:
        """Move our hook if the module it sat on has been replaced, as resizing embeddings or an adapter does."""
        if self._lacks_last_layers(model) or self._is_in_place(model):
            return
        self.settings.hook_point = HookPoint.find(model, next(iter(self.settings.controller.heads.values())).config)
        for handle in self._handles_there:
            handle.remove()
        self._handles_there = []
        self._register_at_hook_point(model)

    @contextmanager
    def call(
        self,
        control: ControlConfig | bool | None,
        weights: Mapping[str, float | Sequence[float]] | None = None,
        generating: bool = False,
    ) -> Iterator[None]:
        """[`CallSettings.use`] around forwards that may be interrupted."""
        with self.settings.use(control, weights, generating):
            try:
                yield
            finally:
                # A KeyboardInterrupt reaches no post-hook.
                self._thread.forward = None

    def _of_states(self, name: str, value: float | tuple[float, ...], hidden: torch.Tensor) -> float | torch.Tensor:
        """A setting for states of shape `(rows, positions, width)` or, flattened by a bool mask, `(states, width)`."""
        if not isinstance(value, tuple):
            return value
        forward, call = self.forward, self.settings.current
        values = torch.tensor(value, dtype=torch.float64).repeat_interleave(1 if call is None else call.expansion)
        flat = hidden.ndim == 2 and forward is not None and isinstance(forward.logits_to_keep, torch.Tensor)
        num_rows = len(forward.logits_to_keep) if flat else len(hidden)
        if len(values) != num_rows:
            raise ValueError(f"{name} holds {len(values)} values for {num_rows} rows.")
        return values[forward.logits_to_keep.nonzero()[:, 0].cpu()][:, None] if flat else values[:, None, None]

    def _asked(
        self, hidden: torch.Tensor, control: ControlConfig
    ) -> tuple[float | torch.Tensor, dict[str, float | torch.Tensor]]:
        """(step size, weight of each head that acts) for states, or for their logits."""
        weights = self.settings.active_weights().items()
        return self._of_states("`step_size`", control.step_size, hidden), {
            name: self._of_states(f"the weight of {name!r}", weight, hidden) for name, weight in weights
        }

    def _edit(self, hidden: torch.Tensor, control: ControlConfig) -> torch.Tensor:
        """Edit states of shape (rows, positions, width) or, flattened by a bool mask, (states, width)."""
        self.hook_point.check_states(hidden)
        step_size, weights = self._asked(hidden, control)
        forward = self.forward
        if forward is not None:
            forward.edited = True
            moved = step_size * sum(map(abs, weights.values()))
            forward.controlled = moved != 0 if isinstance(moved, torch.Tensor) else None
        call = self.settings.current
        edited = self.settings.controller.edit(
            hidden,
            control,
            step_size,
            weights,
            check_states=call is not None and call.generating,
            prepared=call is not None,
        )
        if not torch.compiler.is_compiling() and (edits := getattr(self._thread, "edits", None)) is not None:
            edits.append((hidden, edited))
        return edited

    @contextmanager
    def collect_edits(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """[`read_edits`] of the model of these hooks."""
        self._thread.edits = edits = []
        try:
            yield edits
        finally:
            self._thread.edits = None

    def _with_base(self, base: torch.Tensor, controlled: torch.Tensor, control: ControlConfig) -> torch.Tensor:
        """What goes on through the model: the controlled states, or base and controlled ones as a doubled batch."""
        if not control.is_guarded:
            return controlled
        forward = self.forward
        if forward is None:
            raise RuntimeError(
                "`plausibility` and `max_kl` compare base and controlled logits behind the model's forward: call "
                "`model(...)`, not `model.forward(...)` or a part of the model."
            )
        forward.doubled = len(base)
        return torch.cat([base, controlled])

    def begin_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Pre-hook of the model: note which positions' logits are kept."""
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "A controlled model cannot run in `nn.DataParallel` (what Trainer takes for one process with several "
                "GPUs): its copies run in threads of their own, which `disable_control()` and settings of a call do "
                "not reach. Start one process for each GPU (`accelerate launch`, `torchrun`), or show one GPU alone "
                "(CUDA_VISIBLE_DEVICES=0)."
            )
        if asked := sorted({"control", "value_heads"} & kwargs.keys()):
            # Most models would take it, and do nothing about it.
            raise TypeError(
                f"`{asked[0]}` is an argument of `generate`. For a forward use `with model.use_control(control, "
                "value_heads): ...` or `with model.disable_control(): ...`."
            )
        logits_to_keep = kwargs.get("logits_to_keep", 0)
        call = self.settings.current
        if not self.hook_point.is_last and not self.knows_logits_to_keep and call is not None and call.generating:
            logits_to_keep = 1  # what generate would have asked for
        if call is not None:
            call.has_run = True
        self._thread.forward = _Forward(0 if logits_to_keep is None else logits_to_keep)
        control = self.settings.active_control()
        if control is not None and not torch.compiler.is_compiling():
            self.follow(model)
        if control is None or not control.is_guarded:
            return None
        if kwargs.get("labels") is not None:
            raise ValueError(
                "`plausibility` and `max_kl` act behind the forward that would compute the loss of `labels`: compute "
                "it from the logits, or set `plausibility=0` and `max_kl=None` for this call."
            )
        if self.hook_point.layer is not None and isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
            # The model slices the doubled batch, so it needs the positions of both halves.
            return args, {**kwargs, "logits_to_keep": torch.cat([logits_to_keep, logits_to_keep])}
        return None

    def edit_layer_output(self, layer: nn.Module, args: tuple, output: Any):
        """Post-hook of a decoder layer: edit the states whose logits are kept."""
        control = self.settings.active_control() if self.in_use else None
        if control is None:
            return None
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        forward = self.forward
        logits_to_keep = 0 if forward is None else forward.logits_to_keep
        edited = _put_back(hidden, self._edit(_keep(hidden, logits_to_keep), control), logits_to_keep)
        edited = self._with_base(hidden, edited, control)
        return type(output)([edited, *output[1:]]) if isinstance(output, (tuple, list)) else edited

    def _control_at_head(self) -> ControlConfig | None:
        if not self.in_use:
            return None
        call = self.settings.current
        is_beside = self.forward is None and call is not None and call.generating and call.has_run
        return None if is_beside else self.settings.active_control()

    def edit_head_input(self, lm_head: nn.Module, args: tuple):
        """Pre-hook of the LM head: edit all states that reach it."""
        control = self._control_at_head()
        if control is None:
            return None
        return (self._with_base(args[0], self._edit(args[0], control), control), *args[1:])

    def shift_logits(self, lm_head: nn.Module, args: tuple, output: torch.Tensor):
        """Post-hook of the LM head: add the heads' token bias to the logits of all edited states."""
        control = self._control_at_head()
        if control is None or not self.settings.controller.shifts_tokens(control, self.settings.active_weights()):
            return None
        doubled = self.forward is not None and self.forward.doubled > 0
        base, logits = output.chunk(2) if doubled else (None, output)
        logits = self.settings.controller.shifted(
            logits, control, *self._asked(logits, control), prepared=self.settings.current is not None
        )
        return torch.cat([base, logits]) if doubled else logits

    def end_forward(self, model: nn.Module, args: tuple, output: Any):
        """Post-hook of the model, called also when its forward fails: split a doubled batch and apply the guards."""
        forward = self.forward
        self._thread.forward = None
        control = self.settings.active_control()
        if forward is None or output is None or control is None:
            return None
        if not forward.edited and self._lacks_last_layers(model):
            call = self.settings.current
            if call is not None and call.is_early_exit:
                return None  # a draft, which transformers lowers the number of layers for
            raise RuntimeError(
                f"Control did not reach its hook point, {self.hook_point}: `config.num_hidden_layers` is lower than "
                "when the head was put on, and this forward runs the first layers alone. Set it back, or `unload()` "
                "the head; for drafts of the first layers call `generate(..., assistant_early_exit=...)`."
            )
        if not forward.edited:
            raise RuntimeError(
                f"Control did not reach its hook point, {self.hook_point}: this forward passes by the module there, "
                "as kernels do that read the LM head's weight instead of calling it. Turn them off."
            )
        if forward.doubled == 0:
            return None
        is_tuple = isinstance(output, tuple)
        base, logits = (output[0] if is_tuple else output.logits).chunk(2)
        logits = guarded_logits(base, logits, control.plausibility, control.max_kl, forward.controlled)
        if is_tuple:
            return (logits, *(_controlled_half(part, forward.doubled) for part in output[1:]))
        output.logits = logits
        if output.get("hidden_states") is not None:
            output.hidden_states = _controlled_half(output.hidden_states, forward.doubled)
        return output


def follow(model: nn.Module) -> None:
    """Put the hooks of a controlled model in their place, which other hooks are to come before."""
    hooks = getattr(model, "_recontrol", None)
    if hooks is not None:
        hooks.follow(model)


def read_edits(model: nn.Module) -> AbstractContextManager[list[tuple[torch.Tensor, torch.Tensor]]]:
    """
    A context manager that collects what the heads of a controlled model do to its states: of each forward in the
    block, in this thread, the states whose logits are kept, before and after the edit. A forward under no control adds
    nothing, nor does compiled code.
    """
    hooks: ControlHooks = getattr(model, "_recontrol", None)
    return hooks.collect_edits()
