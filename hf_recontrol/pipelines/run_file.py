"""The settings of a run of [`fit`] as a YAML file, so that it can be repeated."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from ..collection.rewards import ColumnReward
from ..settings import FitSettings, LoadingSettings
from ..utils.files import atomic_path
from ..utils.setting_fields import Settings

RUN_NAME = "fit.yaml"
_PACKAGE = __name__.partition(".")[0]
# What a run works on, beside its settings.
RUN_INPUTS = ("model", "prompts", "reward", "output")


def _name(source: Any) -> str | None:
    """A file, folder or Hub name, the first two by their whole paths; `None` for what has no name."""
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        return None
    return os.path.abspath(source) if os.path.exists(source) else os.fspath(source)


def _names_of_rewards(rewards: Sequence[str | Callable], functions: Sequence[Callable]) -> list[str] | None:
    """Rewards as the command takes them, or `None` if one has no name that another process could import."""
    names = []
    for reward, function in zip(rewards, functions, strict=True):
        if isinstance(function, ColumnReward):
            names.append(f"column:{function.column}")
        else:
            names.append(_name_of_reward(reward) if isinstance(reward, str) else _importable(reward))
    return None if None in names else names


def _name_of_reward(reward: str) -> str | None:
    """A reward's name, in which a folder may stand before `#LABEL`."""
    if os.path.exists(reward):
        return _name(reward)
    folder, hash_sign, label = reward.partition("#")
    name = _name(folder)
    return name and f"{name}{hash_sign}{label}"


def _importable(function: Callable) -> str | None:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or not name.isidentifier():
        return None
    # Our own by the names under which they are public.
    if module.startswith(f"{_PACKAGE}."):
        module = _PACKAGE
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return f"{module}:{name}" if found is function else None


def _plain(value: Any) -> Any:
    """What JSON does not know, as what it does: numbers of numpy, paths, members of enumerations."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    value = getattr(value, "value", value)
    return value.item() if hasattr(value, "item") else str(value)


def save_run(
    output: Path,
    model: Any,
    prompts: Any,
    rewards: Sequence[str | Callable],
    functions: Sequence[Callable],
    settings: FitSettings,
    tokenizer: bool,
) -> None:
    """
    Write `fit.yaml` into a run's folder. What was given in Python and has no name is left out, and comments say what
    the file cannot hold.

    Args:
        output (`Path`):
            The run's folder.
        model, prompts, rewards, settings:
            As [`fit`] was given them.
        functions (sequence of callables):
            What the rewards stand for.
        tokenizer (`bool`):
            Whether it was given a tokenizer of its own.
    """
    notes = []
    if isinstance(model, PreTrainedModel):
        dtype = str(model.dtype).removeprefix("torch.")
        if dtype in LoadingSettings.choices("dtype"):
            settings = replace(settings, dtype=dtype)
        notes.append(f"`model` was a loaded model ({dtype}): this is its name, without changes made in memory.")
        if getattr(model, "active_control", None) is not None:
            notes.append("It was under the control of a head, which this file cannot hold: it is for the base alone.")
        settings = replace(settings, revision=getattr(model.config, "_commit_hash", None))
        model = model.config._name_or_path
    if settings.token is not None:
        notes.append("A token of the Hub was given, which no file holds: give it again, or set HF_TOKEN.")
    if tokenizer:
        notes.append("A tokenizer was given in Python: here it is that of the model.")
    if any(not isinstance(reward, str) for reward in rewards):
        notes.append("`reward` was given in Python: this file makes a new run, the same Python call resumes this one.")
    if hasattr(settings.generation_config, "to_json_file"):
        settings.generation_config.to_json_file(output / "generation_config.json")
        settings = replace(settings, generation_config=str(output.absolute()))
    settings = replace(
        settings,
        generation_config=_name(settings.generation_config),
        # Without an advantage part nobody needs them, in the stages either.
        directions=settings.directions and settings.advantage_sizes is not None,
    )
    named = {
        "model": _name(model),
        "prompts": _name(prompts),
        "reward": _names_of_rewards(rewards, functions),
        "output": str(output.absolute()),
    }
    notes += [f"`{name}` was given in Python and has no name here: add it." for name in named if named[name] is None]
    lines = ["# The settings of this run. To repeat it: recontrol fit --config fit.yaml --output another-folder"]
    lines += [f"# {note}" for note in notes]
    values = {name: value for name, value in named.items() if value is not None} | settings.to_dict()
    values = json.loads(json.dumps(values, default=_plain))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=119)
    with atomic_path(output / RUN_NAME) as temporary:
        temporary.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of its version 1.2 (1e-4 is one, 010 is ten, 1:30 is none) and no name twice."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} stands in it twice")
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        text = self.construct_scalar(node)
        return int(text) if re.fullmatch(r"[-+]?[0-9]+", text) else float(text.replace(".inf", "inf"))


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "!number", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.inf$"), list("-+.0123456789")
)
_Loader.add_constructor("!number", _Loader.construct_number)


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
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no YAML file ({error}).") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must hold settings, one `name: value` on each line.")
    for name in RUN_INPUTS:
        value = values.get(name, "")
        items = value if name == "reward" and isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) for item in items):
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
