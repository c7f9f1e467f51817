"""Control as a logits processor, for a model whose class must not change."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedModel

from ..configuration import ControlConfig
from ..control.controller import Controller
from ..control.guards import guarded_logits
from ..heads.value_head import ValueHead
from .causal_lm import ReControlForCausalLM
from .checks import matched_head
from .generation import input_device
from .hook_points import check_linear, find_lm_head

# How large the logits of the second probe are made: beyond what any soft cap leaves alone.
_PROBE = 200.0


class ReControlLogitsProcessor(LogitsProcessor):
    """
    Adds `W u` to the scores, where `u` is a head's edit of the state that the scores were computed from, and the
    head's token bias, so that `model.generate(..., logits_processor=[processor])` draws what the controlled model
    would draw.

    A hook of its own on the LM head's input reads the state. It goes with the processor, or with `remove()`.
    transformers runs the processors that its own settings ask for (`repetition_penalty`, ...) before this one, and
    temperature and the like after it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A decoder-only model whose logits are `W h`, up to a constant factor.
        value_head ([`ValueHead`], `nn.Module`, `str` or `os.PathLike`):
            A head at `hook_point="lm_head"`, or where to load it from.
        control ([`ControlConfig`], *optional*):
            Defaults to that which the head recommends, else to `ControlConfig()`.

    Raises:
        `TypeError`, `ValueError`: as [`ReControlForCausalLM.from_model`]; also if the head acts at another hook point,
        or the model's logits are not a linear map of the state (a soft cap). Calls raise `ValueError` once the model
        has got another LM head, or an adapter on it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        value_head: ValueHead | nn.Module | str | os.PathLike,
        control: ControlConfig | None = None,
    ):
        if isinstance(model, ReControlForCausalLM):
            raise ValueError(
                "This model is controlled already: call `model.unload()` first, or leave the processor out."
            )
        head, self.control, hook_point = matched_head(model, value_head, control)
        if head.config.hook_point != "lm_head":
            raise ValueError(
                f"A logits processor needs a head at the LM head's input, this one reads {head.config.hook_point!r}: "
                "use `ReControlForCausalLM.from_model`."
            )
        self._model, self._lm_head = model, hook_point.module
        like = torch.empty(0, dtype=model.dtype, device=input_device(model))
        check_linear(self._lm_head, hook_point.width, like)
        self._factor = _logit_factor(model, self._lm_head)
        self._controller = Controller(head)
        # Of each thread: the last state, the forwards since the last token, and the length then.
        self._seen = seen = threading.local()

        def see(module, args):
            seen.hidden, seen.forwards = args[0], getattr(seen, "forwards", 0) + 1

        self._finalizer = weakref.finalize(self, self._lm_head.register_forward_pre_hook(see).remove)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._finalizer()

    def _state(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """The states that the next tokens are drawn from, `(rows, hidden_size)`."""
        seen = self._seen
        forwards, begins = getattr(seen, "forwards", 0), getattr(seen, "length", -1) + 1 != input_ids.shape[1]
        hidden = seen.hidden if forwards else None
        seen.forwards, seen.hidden, seen.length = 0, None, input_ids.shape[1]
        # A prompt may take several forwards, or keep all its positions; a token takes one of one position.
        if hidden is None or len(hidden) != len(input_ids) or not (begins or (forwards == 1 and hidden.shape[1] == 1)):
            raise ValueError(
                "The scores are not those of one forward of the model for each token, as with guidance, assisted "
                "decoding, continuous batching or a removed hook: use `ReControlForCausalLM` there."
            )
        return hidden[:, -1]

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        control = self.control
        if find_lm_head(self._model) is not self._lm_head:
            raise ValueError(
                "The LM head has been replaced, as by an adapter or by resizing, since this processor was made: make "
                "another one."
            )
        if isinstance(self._model, ReControlForCausalLM) and self._model.active_control is not None:
            raise ValueError(
                "This model has come under control since this processor was made, so it would be controlled twice: "
                "leave the processor out, or call `model.unload()`."
            )
        hidden = self._state(input_ids)
        if control.is_identity:
            return scores
        step_size: float | torch.Tensor = control.step_size
        if control.per_row:
            if len(control.step_size) != len(scores):
                raise ValueError(f"`step_size` holds {len(control.step_size)} values for {len(scores)} rows.")
            step_size = torch.tensor(control.step_size)[:, None]
        edit = self._controller.edit(hidden, control, step_size, check_states=True) - hidden
        # `forward`, so that no hook on the module sees it. Of the last row, zeros, it makes its constant.
        change = self._lm_head.forward(torch.cat([edit, torch.zeros_like(edit[:1])]))
        change = change[:-1] - change[-1:]
        change = self._controller.shifted(change, control, step_size)
        edited = scores + self._factor * change.to(scores.device, scores.dtype)
        acts = step_size > 0 if isinstance(step_size, torch.Tensor) else None
        edited = guarded_logits(scores, edited, control.plausibility, control.max_kl, acts)
        # Beam search adds up log-probabilities; elsewhere a constant of the row changes nothing.
        return edited.log_softmax(-1)


@torch.no_grad()
def _logit_factor(model: PreTrainedModel, lm_head: nn.Module) -> float:
    """The factor from the LM head's output to the logits, by a forward with a usual state and one with a large."""
    factors = []
    scale = 1.0
    for _ in range(2):
        with _probe(lm_head, scale) as outputs:
            logits = model(
                input_ids=torch.ones(1, 1, dtype=torch.long, device=input_device(model)), use_cache=False
            ).logits
        # The CPU first: not every device knows float64.
        logits, output = logits[0, -1].cpu().double(), outputs[0][0, -1].cpu().double()
        factors.append(float(logits @ output / output.square().sum().clamp(min=1e-30)))
        tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2
        if not (logits - factors[-1] * output).abs().max() <= tolerance * logits.abs().max():
            raise ValueError(
                f"The logits of {type(model).__name__} are not a linear map of the state at its LM head (a soft "
                "cap?), so an edit of the state is no term of the logits: use `ReControlForCausalLM.from_model`."
            )
        scale = _PROBE / max(float(output.abs().max()), 1e-6)
    return factors[0]


@contextmanager
def _probe(lm_head: nn.Module, scale: float) -> Iterator[list[torch.Tensor]]:
    """Multiply the LM head's input inside the block, and collect its output."""
    outputs: list[torch.Tensor] = []
    handles = (
        lm_head.register_forward_pre_hook(lambda module, args: (args[0] * scale, *args[1:])),
        lm_head.register_forward_hook(lambda module, args, output: outputs.append(output)),
    )
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
