"""The settings of a run of [`fit`] as a YAML file, so that it can be repeated."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig, PreTrainedModel

from ..settings import FitSettings, LoadingSettings
from ..utils.files import atomic_path
from ..utils.setting_fields import Settings

RUN_NAME = "fit.yaml"
_PACKAGE = __name__.partition(".")[0]
# What a run works on, beside its settings.
RUN_INPUTS = ("model", "prompts", "reward", "output")


def _name_of_model(model: str | os.PathLike | PreTrainedModel) -> str | None:
    return _name(model.config._name_or_path if isinstance(model, PreTrainedModel) else model)


def _name(source: Any) -> str | None:
    """A file, folder or Hub name, the first two by their whole paths; `None` for what has no name."""
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        return None
    return os.path.abspath(source) if os.path.exists(source) else os.fspath(source)


def _names_of_rewards(rewards: Any) -> list[str] | None:
    """Rewards as the command takes them, or `None` if one has no name that another process could import."""
    given = [rewards] if isinstance(rewards, str) or callable(rewards) else rewards
    names = [reward if isinstance(reward, str) else _importable(reward) for reward in given]
    return None if None in names else names


def _importable(function: Callable) -> str | None:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or not name.isidentifier():
        return None
    # Our own by the names under which they are public.
    if module.startswith(f"{_PACKAGE}."):
        module = _PACKAGE
    found = getattr(importlib.import_module(module), name, None)
    return f"{module}:{name}" if found is function else None


def save_run(output: Path, model: Any, prompts: Any, rewards: Any, settings: FitSettings) -> None:
    """
    Write `fit.yaml` into a run's folder. What was given in Python and has no name is left out, and a comment says so.

    Args:
        output (`Path`):
            The run's folder.
        model, prompts, rewards, settings:
            As [`fit`] was given them.
    """
    if isinstance(model, PreTrainedModel):
        dtype = str(model.dtype).removeprefix("torch.")
        if dtype in LoadingSettings.choices("dtype"):
            settings = replace(settings, dtype=dtype)
    if isinstance(settings.generation_config, GenerationConfig):
        settings.generation_config.save_pretrained(output)
        settings = replace(settings, generation_config=str(output.absolute()))
    named = {
        "model": _name_of_model(model),
        "prompts": _name(prompts),
        "reward": _names_of_rewards(rewards),
        "output": str(output.absolute()),
    }
    missing = [name for name, value in named.items() if value is None]
    lines = ["# The settings of this run. To repeat it: recontrol fit --config fit.yaml --output another-folder"]
    lines += [f"# `{name}` was given in Python and has no name here: add it." for name in missing]
    values = {name: value for name, value in named.items() if value is not None} | settings.to_dict()
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=119)
    with atomic_path(output / RUN_NAME) as temporary:
        temporary.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")


def load_run(path: str | os.PathLike, cls: type[Settings] = FitSettings) -> dict[str, Any]:
    """
    What a YAML file of a run holds: settings, and `model`, `prompts`, `reward` and `output`.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        cls (`type`, *optional*, defaults to [`FitSettings`]):
            Whose settings it may hold, beside those of [`FitSettings`].

    Raises:
        `OSError`: if there is no such file. `ValueError`: if it is no YAML, or holds something else; names the file.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file ({error}).") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must hold settings, one `name: value` on each line.")
    for name in RUN_INPUTS:
        value = values.get(name, "")
        items = value if name == "reward" and isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            kinds = "a text or a list of texts" if name == "reward" else "a text"
            raise ValueError(f"{path}: `{name}` must be {kinds}, got {value!r}.")
    settings = {name: value for name, value in values.items() if name not in RUN_INPUTS}
    for owner in (cls, FitSettings):
        known = {item.name for item in fields(owner)}
        owner.from_dict({name: value for name, value in settings.items() if name in known}, str(path))
        settings = {name: value for name, value in settings.items() if name not in known}
    # What is left is nobody's: say so.
    FitSettings.from_dict(settings, str(path))
    return values
