"""Base models by name: the one way in which all of the package loads one, and whose weights a head may name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..configuration import ValueHeadConfig
from .hub import CONFIG_NAME, is_repo_id

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
# Weights that a message names at most.
_SHOWN = 3
_MERGE = (
    "Merge it first, `peft_model.merge_and_unload().save_pretrained(folder)`, save the tokenizer there too, and load "
    "the base from that folder."
)


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of a `from_pretrained` that say how files are got, the same for a base and a head."""
    return {name: options[name] for name in _HUB_OPTIONS if name in options}


def load_base_model(
    name_or_path: str | os.PathLike, *args, revision: str | None = None, subfolder: str = "", **kwargs
) -> PreTrainedModel:
    """
    A language model by transformers' auto classes: [`~transformers.AutoModelForCausalLM`], or for a model that also
    takes images [`~transformers.AutoModelForImageTextToText`].

    Args:
        name_or_path (`str` or `os.PathLike`):
            A folder or Hub repo.
        revision, subfolder (`str`, *optional*):
            Where the model is in its repo.
        args, kwargs:
            As for the auto classes: `dtype`, `device_map`, `quantization_config`, `trust_remote_code`, `token`, ...

    Raises:
        `OSError`: if there is no such model, or what is named is a head or an adapter. `ValueError`: if its files lack
        weights, which would be random.
    """
    place = {name: value for name, value in {"revision": revision, "subfolder": subfolder}.items() if value}
    check_base(name_or_path, **place, **hub_options(kwargs))
    kwargs |= place | {"output_loading_info": True}
    with naming(name_or_path):
        try:
            model, info = AutoModelForCausalLM.from_pretrained(name_or_path, *args, **kwargs)
        except ValueError as error:
            if "for this kind of AutoModel" not in str(error):
                raise
            model, info = AutoModelForImageTextToText.from_pretrained(name_or_path, *args, **kwargs)
    if missing := sorted(info["missing_keys"]):
        names = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise ValueError(
            f"The files of {name_or_path} lack {len(missing)} weights of {type(model).__name__} ({names}), which "
            "would be random: name a checkpoint of a whole language model."
        )
    return model if subfolder else _with_commit(model, revision, kwargs.get("cache_dir"))


@contextmanager
def naming(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Raise what keeps a base's files away as an `OSError` that names the base: offline, transformers does not."""
    try:
        yield
    except OSError as error:
        if str(name_or_path) in str(error):
            raise
        raise OSError(
            f"The base model {name_or_path} cannot be loaded: {error}\nWhere its files are in a folder, name that "
            "folder as the base."
        ) from error


def check_base(name_or_path: str | os.PathLike, **options) -> None:
    """
    Raise `OSError` if what is named as a base model is a head, an adapter, of which a head could name only the model
    that it sits on, or neither a folder nor the name of a Hub repo.

    Args:
        name_or_path (`str` or `os.PathLike`):
            What is named.
        options:
            Where it is, and how its files are got: `revision`, `subfolder`, `token`, ...
    """
    path = Path(name_or_path)
    if not path.is_dir() and not is_repo_id(str(name_or_path)):
        raise OSError(
            f"The base model {name_or_path} is no folder, and not the name of a Hub repo. If it has moved, name where "
            "it is now."
        )
    try:
        config = ValueHeadConfig.from_json_file(path / CONFIG_NAME)
    except (OSError, ValueError):
        pass
    else:
        raise OSError(f"{name_or_path} is a value head, not a model: its base is {config.base_model_name_or_path}.")
    file = find_adapter_config_file(str(name_or_path), **options)
    if file is None:
        return
    try:
        base = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError):
        base = "another model"
    raise OSError(
        f"{name_or_path} holds an adapter for {base}: merge it first, and name the folder of the merged model. "
        f"`AutoPeftModelForCausalLM.from_pretrained({str(name_or_path)!r}).merge_and_unload().save_pretrained(folder)`"
        " of peft makes it; save the tokenizer there too."
    )


def has_acting_adapter(model: nn.Module) -> bool:
    """Whether an adapter changes what a loaded model computes: one that is on, or merged and not unloaded."""
    return any(
        # PEFT's layers; of transformers' models it is a method.
        isinstance(getattr(module, "disable_adapters", None), bool)
        and (getattr(module, "merged", False) or (module.active_adapters and not module.disable_adapters))
        for module in model.modules()
    )


def check_type(model: Any) -> None:
    """Raise `TypeError` if a loaded base is no model of transformers; says what to do with one of PEFT."""
    if isinstance(model, PreTrainedModel):
        return
    name = type(model).__name__
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise TypeError(f"A {name} cannot be the base of a head. {_MERGE}")
    raise TypeError(f"`model` must be a transformers PreTrainedModel, got {name}.")


def check_nameable(model: Any) -> None:
    """
    Raise unless a head can name what a loaded base computes, so that it is loaded again as it was.

    Raises:
        `TypeError`: as [`check_type`]. `ValueError`: if an adapter acts in it.
    """
    check_type(model)
    if has_acting_adapter(model):
        raise ValueError(
            f"An adapter acts in this {type(model).__name__}, and a head would name its base without it. {_MERGE}"
        )


def _with_commit(model: PreTrainedModel, revision: str | None, cache_dir: str | os.PathLike | None) -> PreTrainedModel:
    """
    A model that was just loaded, with the commit of its repo in its configuration, so that a head can name the very
    weights that it was trained on. Releases of transformers that note it themselves are left to it.
    """
    name = str(model.config._name_or_path)
    if getattr(model.config, "_commit_hash", None) is None and is_repo_id(name) and not os.path.exists(name):
        file = try_to_load_from_cache(name, CONFIG_NAME, cache_dir=cache_dir, revision=revision)
        if isinstance(file, str):
            model.config._commit_hash = Path(file).parent.name
    return model
