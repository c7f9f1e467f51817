"""Base models by name, where this process computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.processes import Processes
from ..heads.hub import check_base, with_commit
from ..modeling.causal_lm import ReControlForCausalLM, load_base_model
from ..settings import LoadingSettings


def load_base(
    name_or_path: str | os.PathLike, settings: LoadingSettings, value_head: str | os.PathLike | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A base model, controlled by a head if one is named, and its tokenizer.

    Raises:
        `OSError`: if there is no such model, or what is named is a head.
    """
    check_base(name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if value_head is not None:
        return load_controlled(name_or_path, settings, value_head=value_head), tokenizer
    return with_commit(_on_device(load_base_model, settings, name_or_path)), tokenizer


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
