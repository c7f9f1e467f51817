"""Where a head acts in a model: its decoder layers and its LM head, found by structure."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration import ValueHeadConfig


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


def hook_layer(model: PreTrainedModel, config: ValueHeadConfig) -> int | None:
    """
    Index, counted from 0, of the decoder layer that a head of this configuration reads, or `None` at the LM head.

    Raises:
        `ValueError`: if the model has no such layer.
    """
    if config.hook_point == "lm_head":
        return None
    num_layers = len(find_decoder_layers(model))
    if not -num_layers <= config.layer < num_layers:
        raise ValueError(f"The head reads decoder layer {config.layer}, {type(model).__name__} has {num_layers}.")
    return config.layer % num_layers


def hook_width(model: PreTrainedModel, config: ValueHeadConfig) -> int:
    """
    Width of the state at the hook point of `config`.

    Raises:
        `ValueError`: if the model has no such place.
    """
    text_config = model.config.get_text_config(decoder=True)
    if hook_layer(model, config) is None:
        lm_head = find_lm_head(model)
        return getattr(lm_head, "in_features", None) or text_config.hidden_size
    return text_config.hidden_size
