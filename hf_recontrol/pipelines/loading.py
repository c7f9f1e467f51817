"""Base models and their tokenizers as settings say, where this process computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..collection.batches import recorded_control, shown_control, weights_as_sampled
from ..configuration import ControlConfig, ValueHeadConfig
from ..data.processes import device_of
from ..data.stage_folder import read_manifest
from ..heads.base_model import check_base, load_base_model, naming
from ..heads.resolution import base_of_head, revision_named
from ..heads.value_head import ValueHead, in_eval
from ..modeling.causal_lm import ReControlForCausalLM, without_heads
from ..modeling.generation import check_causal
from ..modeling.hook_points import HookPoint, lm_head_rows
from ..settings import EngineSettings, FitSettings, HookPointSettings, LoadingSettings, SourceSettings


def base_source(settings: SourceSettings) -> dict[str, str]:
    """The settings that say where a base's files are got, if they are set, as arguments of `from_pretrained`."""
    return {name: value for name in ("revision", "token") if (value := getattr(settings, name)) is not None}


def check_same_weights(loading: LoadingSettings, drawing: EngineSettings) -> None:
    """
    Raise `ValueError` if the base is quantised as it is loaded here, but not where an engine that is started for its
    rollouts loads it.
    """
    if loading.quantization_config and drawing.engine == "vllm" and "quantization" not in drawing.engine_arguments:
        raise ValueError(
            "`quantization_config` quantises the base here, and vLLM would draw from the whole one: say "
            "`engine_arguments: {quantization: ...}` too, or leave it out."
        )


def settings_for_base(base: PreTrainedModel, settings: FitSettings) -> FitSettings:
    """Settings whose head the base can have, checked before any response is sampled."""
    check_causal(base)
    directions = settings.with_directions
    if directions:
        lm_head_rows(base)
    settings = replace(
        settings, directions=directions, advantage_sizes=settings.advantage_sizes if directions else None
    )
    if settings.critic_layer is not None:
        HookPoint.find(base, HookPointSettings(hook_point="decoder_layer", layer=settings.critic_layer))
    # Says so if no head can have this shape.
    ValueHeadConfig(
        HookPoint.find(base, settings).width,
        head_sizes=settings.head_sizes,
        advantage_sizes=settings.advantage_sizes,
        static_vector=directions,
        hook_point=settings.hook_point,
        layer=settings.layer,
    )
    return settings


def check_one(**given: Any) -> None:
    """Raise `TypeError` for what is to be one name, or one loaded module, and is not, such as a list; names it."""
    for name, value in given.items():
        if value is not None and not isinstance(value, (str, os.PathLike, nn.Module)):
            raise TypeError(
                f"`{name}` must be one folder or Hub name, or what was loaded from it, got {value!r}: for several, "
                "call this for each, with an `output` of its own."
            )


def load_tokenizer(name_or_path: str | os.PathLike, settings: SourceSettings) -> PreTrainedTokenizerBase:
    """
    A base's tokenizer.

    Raises:
        `OSError`, `ValueError`: as [`load_base_model`].
    """
    source = base_source(settings)
    # Before the tokenizer, which may be there or not.
    check_base(name_or_path, **source)
    with naming(name_or_path):
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=settings.trust_remote_code, **source)


def load_base(
    name_or_path: str | os.PathLike,
    settings: LoadingSettings,
    value_head: nn.Module | str | os.PathLike | None = None,
    control: ControlConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A base model, controlled by a head if one is given or named, and its tokenizer, unless another one is given.

    Raises:
        `OSError`, `ValueError`: as [`load_base_model`]; if there is no such device.
    """
    device = device_of(settings.device)
    if value_head is not None:
        if not isinstance(value_head, nn.Module):
            value_head = ValueHead.from_pretrained(value_head, token=settings.token)
        settings = replace(settings, revision=settings.revision or revision_named(value_head, name_or_path))
    if tokenizer is None:
        tokenizer = load_tokenizer(name_or_path, settings)
    arguments: dict[str, Any] = base_source(settings) | {"trust_remote_code": settings.trust_remote_code}
    arguments["dtype"] = settings.dtype
    if settings.device_map is not None:
        arguments["device_map"] = settings.device_map
    if settings.quantization_config is not None:
        # What is quantised as it is loaded is made where it stays. device_map needs accelerate, as this does.
        arguments = {"device_map": str(device)} | arguments
        arguments["quantization_config"] = dict(settings.quantization_config)
    if value_head is None:
        model = load_base_model(name_or_path, **arguments)
    else:
        model = ReControlForCausalLM.from_pretrained(name_or_path, value_head=value_head, control=control, **arguments)
    # A model of 8 bits may not be moved, not even to where it is.
    if "device_map" not in arguments and model.device != device:
        model = model.to(device)
    return model.eval(), tokenizer


@contextmanager
def base_with_head(
    base: str | os.PathLike | PreTrainedModel | None,
    head: str | os.PathLike | nn.Module | None,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: LoadingSettings,
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """
    The base, with the head if there is one, and its tokenizer. A model that was given is afterwards as it was.

    Args:
        base (`str`, `os.PathLike` or [`~transformers.PreTrainedModel`], *optional*):
            A folder or Hub name, or a loaded model. By default that which the head names.
        head (`str`, `os.PathLike` or `nn.Module`, *optional*):
            A folder or Hub name, or a loaded head.

    Raises:
        `OSError`, `ValueError`: as [`load_base`]; if no base is named, or a loaded one comes without its tokenizer.
    """
    if isinstance(base, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("A loaded model needs its tokenizer: give it (`tokenizer=`).")
        if head is None:
            with in_eval(base):
                yield base, tokenizer
            return
        with in_eval(base), without_heads(base):
            model = ReControlForCausalLM.from_model(base, head)
            try:
                yield model, tokenizer
            finally:
                model.unload()
        return
    if head is not None and not isinstance(head, ValueHead):
        head = ValueHead.from_pretrained(head, token=settings.token)
    if base is None:
        if not isinstance(head, ValueHead):
            raise ValueError("No base model is named, and no head that names one.")
        place = (head.source or {}).get("pretrained_model_name_or_path")
        found = base_of_head(head, place)
        base, settings = found.base, replace(settings, revision=settings.revision or found.revision)
    yield load_base(base, settings, head, tokenizer=tokenizer)


def tokenizer_as_sampled(
    name_or_path: str | os.PathLike | None, settings: SourceSettings, rollouts: str | os.PathLike
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, by default of the one that drew a folder of rollouts, at the commit that drew them."""
    drawn_by = read_manifest(rollouts, "rollouts", "recontrol rollout", complete=False)["settings"]
    name_or_path = name_or_path or drawn_by["model"]
    if name_or_path is None:
        raise ValueError(f"The rollouts in {rollouts} name no base: name it (`--model`), for its tokenizer.")
    if settings.revision is None and str(name_or_path) == drawn_by["model"]:
        settings = replace(settings, revision=drawn_by["model_revision"])
    try:
        return load_tokenizer(name_or_path, settings)
    except OSError as error:
        raise OSError(f"{error} If the base that drew the rollouts has moved, name it (`--model`).") from error


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
    control = recorded_control(manifest)
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
    heads = [ValueHead.from_pretrained(**place, token=settings.token) for place in places]
    if value_head is not None and not control["control"]:
        raise ValueError(f"The rollouts in {rollouts} were sampled under no control: leave the head out.")
    weights_as_sampled(
        control, {str(place["pretrained_model_name_or_path"]): head for place, head in zip(places, heads, strict=True)}
    )
    drawn_by = manifest["settings"]
    if settings.revision is None and str(name_or_path) == drawn_by["model"]:
        settings = replace(settings, revision=drawn_by["model_revision"])
    model, _ = load_base(name_or_path, settings, heads[0] if heads else None)
    for number, head in enumerate(heads[1:]):
        model.add_value_head(f"head-{number}", head)
    return model
