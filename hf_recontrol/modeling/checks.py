"""Whether a head, a control and a model go together: checked before anything is changed."""

from __future__ import annotations

import inspect
import os
import re

from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import logging

from ..configuration import ControlConfig, ValueHeadConfig
from ..control.controller import METHODS
from ..heads.value_head import ValueHead
from .hook_points import HookPoint, find_lm_head

logger = logging.get_logger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def head_config(head: nn.Module) -> ValueHeadConfig:
    """The configuration of a head.

    Raises:
        `TypeError`: if it has none.
    """
    config = getattr(head, "config", None)
    if not isinstance(head, nn.Module) or not isinstance(config, ValueHeadConfig):
        raise TypeError(
            f"`value_head` must be a ValueHead, its folder or Hub repo, or a module whose `config` is a "
            f"ValueHeadConfig, got {type(head).__name__}."
        )
    return config


def matched_head(
    model: PreTrainedModel,
    value_head: ValueHead | nn.Module | str | os.PathLike,
    control: ControlConfig | None,
) -> tuple[nn.Module, ControlConfig, HookPoint]:
    """
    A head, loaded if need be, its control (that which the head recommends, else `ControlConfig()`, if none is given),
    and where it acts; checked against the model that they are for.

    Raises:
        `TypeError`, `ValueError`: as [`ReControlForCausalLM.from_model`].
    """
    check_model(model)
    if isinstance(value_head, (str, os.PathLike)):
        value_head = ValueHead.from_pretrained(value_head)
    config = head_config(value_head)
    if control is None:
        control = config.control or ControlConfig()
    config.check_control(control)
    hook_point = check_head(model, value_head)
    check_not_idle(value_head, control)
    return value_head, control, hook_point


def check_model(model: PreTrainedModel) -> None:
    """Raise `TypeError` or `ValueError` if a model is none that can be controlled."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers PreTrainedModel, got {type(model).__name__}.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; only decoder-only models are supported.")
    find_lm_head(model)
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} cannot generate: load it with AutoModelForCausalLM.")
    if (inner := _generates_by(model)) is not None:
        raise ValueError(
            f"{type(model).__name__} generates by its part `{inner}`, past whatever is put on the whole: control "
            f"`model.{inner}` instead."
        )


def _generates_by(model: PreTrainedModel) -> str | None:
    """The name of the language model whose `generate` a model's own calls (BLIP-2, InstructBLIP, Kosmos-2, ...)."""
    generate = inspect.unwrap(type(model).generate)
    # One that says `super()` goes on with the model's own forward.
    if generate is inspect.unwrap(GenerationMixin.generate) or "__class__" in generate.__code__.co_freevars:
        return None
    parts = model.named_children()
    return next((name for name, part in parts if isinstance(part, GenerationMixin) and part.can_generate()), None)


def check_head(model: PreTrainedModel, head: nn.Module) -> HookPoint:
    """
    Where a head acts in a model, checked that it reads the states there; warns if it was trained for another model.

    Raises:
        `ValueError`: if it does not, or holds values that are not finite.
    """
    config = head_config(head)
    hook_point = HookPoint.find(model, config)
    if hook_point.width != config.hidden_size:
        raise ValueError(
            f"The head reads states of width {config.hidden_size}, {type(model).__name__} has {hook_point.width} at "
            f"{config.hook_point!r}: it was made for another base model"
            f"{f' ({config.base_model_name_or_path})' if config.base_model_name_or_path else ''}."
        )
    size, vocabulary = config.token_bias_size, getattr(find_lm_head(model), "out_features", None)
    if size is not None and vocabulary is not None and size > vocabulary:
        raise ValueError(
            f"The head's token bias is of {size} tokens, the LM head of {type(model).__name__} of {vocabulary}: it "
            "was made for another vocabulary."
        )
    if isinstance(head, ValueHead):
        head.check_finite()
    _warn_of_other_base(model, config)
    return hook_point


def check_not_idle(head: nn.Module, control: ControlConfig) -> None:
    """
    Refuse a head whose edit is zero whatever the state (an untrained g, a V that is constant), or a module that lacks
    what the method calls.
    """
    method = METHODS[control.method]
    if not isinstance(head, ValueHead):
        method.check_module(head)
    elif method.is_idle(head):
        raise ValueError(
            f"This head would do nothing under `method={control.method!r}`: {method.part} is all zeros, so it is not "
            "trained."
        )


def _warn_of_other_base(model: PreTrainedModel, config: ValueHeadConfig) -> None:
    trained_for, here = config.base_model_name_or_path, model.config._name_or_path
    if trained_for and here and os.path.basename(trained_for.rstrip("/")) != os.path.basename(here.rstrip("/")):
        logger.warning(
            f"This head was trained for {trained_for!r} and is put on {here!r}: the widths fit, but its values may "
            "mean nothing there."
        )
    commits = (config.base_model_revision, getattr(model.config, "_commit_hash", None))
    if trained_for == here and all(map(_COMMIT.fullmatch, map(str, commits))) and len(set(commits)) > 1:
        logger.warning(
            f"This head was trained for {trained_for!r} at commit {commits[0]}, and this is {commits[1]}: if its "
            "weights are others, the head's values mean little there."
        )
