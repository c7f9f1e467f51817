"""
Where heads read and edit the state: a model's decoder layers and its LM head, found by structure; and reading it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ..heads.value_head import in_eval

# Rounding, relative to the largest logit: in float32 (and float64), and in the shorter dtypes.
_ROUNDING, _COARSE_ROUNDING = 1e-3, 5e-2
# Features whose rows are made at once.
_FEATURES_AT_ONCE = 256
# `torch.compiler.set_stance` is for the process: two threads must not end it in another order than they began.
_one_stance = threading.Lock()


class NamesHookPoint(Protocol):
    """What says where: a [`ValueHeadConfig`], or settings of a run."""

    hook_point: str
    layer: int


@dataclass(frozen=True)
class HookPoint:
    """
    Where heads read and edit the state of one model: found once ([`HookPoint.find`]), then carried.

    Args:
        module (`nn.Module`):
            The decoder layer whose output, or the LM head whose input, is the state.
        layer (`int` or `None`):
            Index of the decoder layer, counted from 0; `None` at the LM head.
        width (`int`):
            Width of the state.
        is_last (`bool`):
            Whether no decoder layer follows, so that an edit is in no key-value cache.
    """

    module: nn.Module
    layer: int | None
    width: int
    is_last: bool

    @classmethod
    def find(cls, model: PreTrainedModel, where: NamesHookPoint) -> HookPoint:
        """
        The hook point that `where` names, in a model.

        Raises:
            `ValueError`: if the model has no such layer, or no LM head.
        """
        text_config = model.config.get_text_config(decoder=True)
        if where.hook_point == "lm_head":
            lm_head = find_lm_head(model)
            width = getattr(lm_head, "in_features", None) or text_config.hidden_size
            return cls(lm_head, None, width, is_last=True)
        layers = find_decoder_layers(model)
        count = len(layers)
        if not -count <= where.layer < count:
            raise ValueError(f"The head reads decoder layer {where.layer}, {type(model).__name__} has {count}.")
        index = where.layer % count
        return cls(layers[index], index, text_config.hidden_size, is_last=index == count - 1)

    def check_states(self, hidden: torch.Tensor) -> None:
        """Raise `ValueError` if what is found there is no `(batch, positions, width)`, nor `(states, width)` of it."""
        if hidden.shape[-1] != self.width or hidden.ndim not in (2, 3):
            raise ValueError(
                f"At {self} this model's states have shape {tuple(hidden.shape)}, a head reads (batch, positions, "
                f"{self.width}): this architecture cannot be controlled there."
            )

    def __str__(self) -> str:
        return "the LM head" if self.layer is None else f"decoder layer {self.layer}"


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """
    The decoder layers of a causal language model (of its language half, if it is multimodal).

    They are the outermost `ModuleList` of `num_hidden_layers` modules inside the decoder.

    Raises:
        `ValueError`: if there is no such list, or more than one.
    """
    num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    outermost = min((name.count(".") for name, _ in lists), default=0)
    lists = [(name, module) for name, module in lists if name.count(".") == outermost]
    if len(lists) != 1:
        found = "none" if not lists else ", ".join(name for name, _ in lists)
        raise ValueError(
            f"{type(model).__name__} cannot be controlled at a decoder layer: its decoder should hold one ModuleList "
            f"of num_hidden_layers={num_layers} layers, found {found}. Use a head with `hook_point='lm_head'`."
        )
    return lists[0][1]


def find_lm_head(model: PreTrainedModel) -> nn.Module:
    """
    The module that maps the last hidden state to logits.

    Raises:
        `ValueError`: if the model has none.
    """
    lm_head = model.get_output_embeddings()
    if lm_head is None:
        raise ValueError(f"{type(model).__name__} has no LM head: load the model with AutoModelForCausalLM.")
    return lm_head


def _is_plain(lm_head: nn.Module) -> bool:
    """Whether what a module does is known without trying: a linear layer whose weight nothing wraps or has moved."""
    return (
        type(lm_head) is nn.Linear
        and "forward" not in lm_head.__dict__
        and type(lm_head.weight) is nn.Parameter
        and lm_head.weight.is_floating_point()
        and not lm_head.weight.is_meta
    )


def uses_its_weight(lm_head: nn.Module) -> bool:
    """
    Whether an LM head's logits are those of its `weight` and `bias`, bit for bit: not so with an adapter on it, or if
    it is quantised or offloaded.
    """
    if _is_plain(lm_head):
        return True
    weight, bias = getattr(lm_head, "weight", None), getattr(lm_head, "bias", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.is_meta or weight.ndim != 2:
        return False
    probe = _random_states(1, weight.shape[1], weight)
    try:
        with torch.no_grad(), in_eval(lm_head):
            return torch.equal(lm_head.forward(probe), nn.functional.linear(probe, weight, bias))
    except (RuntimeError, TypeError, NotImplementedError):  # a weight of a shape or kind of its own
        return False


def _random_states(count: int, width: int, like: torch.Tensor) -> torch.Tensor:
    states = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return states.to(like.device, like.dtype)


@torch.no_grad()
def check_linear(lm_head: nn.Module, width: int, like: torch.Tensor) -> None:
    """
    Raise `ValueError` if an LM head is no linear map of the state (and a constant).

    Args:
        width (`int`):
            Of the state.
        like (`torch.Tensor`):
            Of the state's dtype, and on its device.
    """
    one, two = _random_states(2, width, like)
    with in_eval(lm_head):
        # `forward`, so that no hook on the module sees it. The CPU first: not every device knows float64.
        first, second, both, none = lm_head.forward(torch.stack([one, two, one + two, 0 * one])).cpu().double()
    tolerance = _ROUNDING if like.dtype in (torch.float32, torch.float64) else _COARSE_ROUNDING
    if not (first + second - both - none).abs().max() <= tolerance * both.abs().max():
        raise ValueError(
            f"The LM head, a {type(lm_head).__name__}, is no linear map of the state, so the advantage part and the "
            "logits processor have no meaning there: leave the directions out (`directions=False`), and use "
            "`ReControlForCausalLM.from_model`."
        )


@torch.no_grad()
def lm_head_rows(model: PreTrainedModel) -> torch.Tensor:
    """
    The matrix W of shape `(vocabulary, hidden_size)` by which the LM head maps a state to logits, on whose rows the
    advantage part is trained. It is the head's own weight or, where the logits come of something else (an adapter too,
    a quantised or an offloaded weight), what the head makes of each feature alone, as much memory again.

    Raises:
        `ValueError`: if the LM head is no linear map.
    """
    lm_head = find_lm_head(model)
    if uses_its_weight(lm_head) and type(lm_head.weight) in (nn.Parameter, torch.Tensor):
        return lm_head.weight.detach()
    width = getattr(lm_head, "in_features", None) or model.config.get_text_config(decoder=True).hidden_size
    like = torch.empty(0, dtype=model.dtype, device=lm_head_device(lm_head))
    check_linear(lm_head, width, like)
    features = torch.eye(width, dtype=like.dtype, device=like.device)
    with in_eval(lm_head):
        constant = lm_head.forward(torch.zeros_like(features[:1]))
        rows = constant.new_empty(constant.shape[-1], width)
        for columns in torch.arange(width).split(_FEATURES_AT_ONCE):
            rows[:, columns] = (lm_head.forward(features[columns]) - constant).T
    return rows


def lm_head_device(lm_head: nn.Module) -> torch.device:
    """Where an LM head takes its input."""
    tensors = itertools.chain(lm_head.parameters(), lm_head.buffers())
    # What is offloaded is moved, with its input, when it is called.
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


@contextmanager
def read_states(hook_point: HookPoint, keep_logits: bool = False) -> Iterator[list[torch.Tensor]]:
    """
    Collect the states at a hook point, of shape `(batch, positions, width)`, one tensor for each forward in the block.

    Unless `keep_logits`, the LM head is handed one position only where it is the hook point, so that a long forward
    makes no vocabulary-sized tensor for each position: then the logits of forwards inside the block are of no use.
    Under control the states are those before the edit. At the LM head only the positions of `logits_to_keep` are seen.
    Forwards of other threads are left alone.
    """
    states: list[torch.Tensor] = []
    reader = threading.get_ident()

    def read_head_input(module, args):
        if threading.get_ident() != reader:
            return None
        states.append(args[0])
        return None if keep_logits else (args[0][:, :1], *args[1:])

    def read_layer_output(module, args, output):
        if threading.get_ident() == reader:
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            hook_point.check_states(hidden)
            states.append(hidden)

    # First, so that what is read is the base's state, also under control.
    if hook_point.layer is None:
        handle = hook_point.module.register_forward_pre_hook(read_head_input, prepend=True)
    else:
        handle = hook_point.module.register_forward_hook(read_layer_output, prepend=True)
    try:
        yield states
    finally:
        handle.remove()


@contextmanager
def uncompiled(model: PreTrainedModel) -> Iterator[None]:
    """Run a model as it was before it was compiled, inside the block: compiled code looks for no new hooks."""
    if not any(
        part._compiled_call_impl is not None or hasattr(part.forward, "_torchdynamo_orig_callable")
        for part in model.modules()
    ):
        yield
        return
    with _one_stance, torch.compiler.set_stance("force_eager"):
        yield
