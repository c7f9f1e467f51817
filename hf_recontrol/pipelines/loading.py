"""Base models by name, where this process computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..collection.batches import shown_control, weights_as_sampled
from ..data.fingerprints import NO_CONTROL
from ..data.processes import Processes
from ..data.stage_folder import read_manifest
from ..heads.hub import check_base, with_commit
from ..heads.value_head import ValueHead
from ..modeling.causal_lm import ReControlForCausalLM, load_base_model
from ..settings import LoadingSettings


def load_base(
    name_or_path: str | os.PathLike, settings: LoadingSettings, value_head: nn.Module | str | os.PathLike | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A base model, controlled by a head if one is given or named, and its tokenizer.

    Raises:
        `OSError`: if there is no such model, or what is named is a head.
    """
    check_base(name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if value_head is not None:
        return load_controlled(name_or_path, settings, value_head=value_head), tokenizer
    return with_commit(_on_device(load_base_model, settings, name_or_path)), tokenizer


def load_as_sampled(
    name_or_path: str | os.PathLike,
    settings: LoadingSettings,
    rollouts: str | os.PathLike,
    value_head: str | os.PathLike | None = None,
) -> PreTrainedModel:
    """
    The base model of a folder of rollouts, with the heads that acted when these were sampled: `value_head`, or those
    that the folder names.

    Raises:
        `ValueError`: before the base is loaded, if a head is not the one that acted, or nobody knows where that is.
    """
    manifest = read_manifest(rollouts, "rollouts", "recontrol rollout")
    control = {name: manifest["settings"][name] for name in NO_CONTROL}
    if value_head is None:
        known = manifest.get("head_sources") or {}
        places = [known.get(name) for name in control["heads"]]
    else:
        places = [{"pretrained_model_name_or_path": value_head}]
    if None in places:
        raise ValueError(
            f"The rollouts in {rollouts} were sampled under {shown_control(control)}, and nobody wrote down where "
            "that head is: name it (`--head`)."
        )
    heads = [ValueHead.from_pretrained(**place) for place in places]
    if value_head is not None and not control["control"]:
        raise ValueError(f"The rollouts in {rollouts} were sampled under no control: leave the head out.")
    weights_as_sampled(
        control, {str(place["pretrained_model_name_or_path"]): head for place, head in zip(places, heads, strict=True)}
    )
    model, _ = load_base(name_or_path, settings, heads[0] if heads else None)
    for number, head in enumerate(heads[1:]):
        model.add_value_head(f"head-{number}", head)
    return model


def load_controlled(name_or_path: str | os.PathLike, settings: LoadingSettings, **kwargs: Any) -> ReControlForCausalLM:
    """[`ReControlForCausalLM.from_pretrained`] where this process computes."""
    return _on_device(ReControlForCausalLM.from_pretrained, settings, name_or_path, **kwargs)


def _on_device(load: Callable, settings: LoadingSettings, name_or_path: str | os.PathLike, **kwargs):
    # device_map needs accelerate, a plain device does not.
    if settings.device == "auto":
        return load(name_or_path, dtype=settings.dtype, device_map="auto", **kwargs).eval()
    try:
        device = torch.device(settings.device or Processes().device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be one that torch knows, or `auto`, got {settings.device!r}.") from error
    return load(name_or_path, dtype=settings.dtype, **kwargs).eval().to(device)
