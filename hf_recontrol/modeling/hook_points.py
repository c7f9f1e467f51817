"""Where heads read and edit the state: a model's decoder layers and its LM head, found by structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel


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


def lm_head_rows(model: PreTrainedModel) -> torch.Tensor:
    """
    The LM head's weight of shape `(vocabulary, hidden_size)`, whose rows the advantage part is trained on.

    Raises:
        `ValueError`: if it is quantised.
    """
    weight = find_lm_head(model).weight
    if not weight.is_floating_point():
        raise ValueError(
            f"The LM head's weight is {weight.dtype}, so its rows cannot be read for the advantage part: load the "
            "base with its LM head unquantised, or leave `advantage_sizes` out."
        )
    return weight
