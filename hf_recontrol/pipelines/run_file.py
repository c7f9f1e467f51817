"""The settings of a run of [`fit`] as a YAML file, so that it can be repeated."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..collection.scoring.rewards import ColumnReward
from ..data.stage_folder import MANIFEST_NAME
from ..settings import FitSettings, LoadingSettings
from ..utils.files import atomic_path, check_target
from ..utils.setting_fields import Settings
from ..utils.yaml_files import read_yaml, yaml_text

RUN_NAME = "fit.yaml"
_REPORT_NAME = "report.html"
# A generation config that was given as an object.
_DRAWING_NAME = "generation_config.json"
_HEADING = "# The settings of this run."
_PACKAGE = __name__.partition(".")[0]
# What a run works on, beside its settings.
RUN_INPUTS = {"model": "text", "prompts": "text", "reward": "texts", "output": "text"}


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


def round_folder(output: Path, number: int) -> Path:
    """Where a run has the rollouts and states of a round, the first of which is 1: of a run of one round, `output`."""
    return output if number == 1 else output / f"round-{number}"


def earlier_head(output: Path, number: int) -> Path:
    """Where a run has the head of a round that another one followed. That of its last round is in `output/head`."""
    return output / f"round-{number}" / "head"


def _rounds_of(output: Path) -> int:
    """How many rounds a folder holds, or has begun."""
    numbers = [1]
    for folder in output.glob("round-*"):
        if (number := folder.name.removeprefix("round-")).isdecimal():
            numbers.append(int(number) + earlier_head(output, int(number)).exists())
    return max(numbers)


def check_run_folder(output: Path, settings: FitSettings) -> None:
    """
    Check that a run replaces no file in its folder that is somebody else's, such as the file of settings that it was
    started with, and that the folder holds no more rounds than are asked for, and the heads that these were drawn
    under.

    Raises:
        `OSError`: if it would, or its report cannot be written; names the file. `ValueError`: for more rounds, or a
        missing head.
    """
    check_target(output / _REPORT_NAME)
    held = _rounds_of(output)
    if held > settings.rounds:
        raise ValueError(
            f"{output} holds {held} rounds, and `rounds` is {settings.rounds}: ask for as many as it holds, or more "
            f"(`rounds={held}`), or name another folder."
        )
    for number in range(1, held):
        later = round_folder(output, number + 1)
        if (later / "rollouts" / MANIFEST_NAME).exists() and not earlier_head(output, number).exists():
            raise ValueError(
                f"{earlier_head(output, number)} is missing, the head that the responses in {later} were drawn "
                f"under: put it back, or remove {output / 'head'} and the folders of round {number + 1} and later."
            )
    own, others = output / RUN_NAME, []
    is_run = own.is_file() and own.read_text(encoding="utf-8", errors="replace").startswith(_HEADING)
    if own.exists() and not is_run:
        others = [RUN_NAME]
    elif not is_run and not (output / "rollouts" / MANIFEST_NAME).exists():
        names = [_REPORT_NAME] + [_DRAWING_NAME] * hasattr(settings.generation_config, "to_json_file")
        others = [name for name in names if (output / name).exists()]
    if others:
        raise OSError(
            f"{output / others[0]} was not written by a run, and this one would replace it: give the file another "
            "name, or name another `output`."
        )


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
        settings.generation_config.to_json_file(output / _DRAWING_NAME)
        settings = replace(settings, generation_config=str(output.absolute()))
    settings = replace(settings, generation_config=_name(settings.generation_config))
    named = {
        "model": _name(model),
        "prompts": _name(prompts),
        "reward": _names_of_rewards(rewards, functions),
        "output": str(output.absolute()),
    }
    notes += [f"`{name}` was given in Python and has no name here: add it." for name in named if named[name] is None]
    lines = [f"{_HEADING} To repeat it: recontrol fit --config fit.yaml --output another-folder"]
    lines += [f"# {note}" for note in notes]
    values = {name: value for name, value in named.items() if value is not None} | settings.to_dict()
    values = json.loads(json.dumps(values, default=_plain))
    text = yaml_text(values)
    with atomic_path(output / RUN_NAME) as temporary:
        temporary.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")


def load_run(
    path: str | os.PathLike, cls: type[Settings] = FitSettings, inputs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """
    What a YAML file of a run holds: settings, and what the run works on.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        cls (`type`, *optional*, defaults to [`FitSettings`]):
            Whose settings it may hold. Where `inputs` are not given, those of [`FitSettings`] too.
        inputs (`dict[str, str]`, *optional*, defaults to those of [`fit`]):
            What it may hold beside settings, and of each what it must be: `"text"`, `"texts"` (one or a list) or
            `"any"`.

    Raises:
        `OSError`: if there is no such file. `ValueError`: if it is no YAML, or holds something else; names the file.
    """
    owners = [cls] if inputs is not None else [cls, FitSettings]
    inputs = RUN_INPUTS if inputs is None else inputs
    values = read_yaml(path)
    for name, kind in inputs.items():
        value = values.get(name, "")
        items = value if kind == "texts" and isinstance(value, list) else [value]
        if kind != "any" and (not items or not all(isinstance(item, str) for item in items)):
            expected = "a text or a list of texts" if kind == "texts" else "a text"
            raise ValueError(f"{path}: `{name}` must be {expected}, got {value!r}.")
    settings = {name: value for name, value in values.items() if name not in inputs}
    for owner in owners:
        known = {item.name for item in fields(owner)}
        owner.from_dict({name: value for name, value in settings.items() if name in known}, str(path))
        settings = {name: value for name, value in settings.items() if name not in known}
    # What is left is nobody's: say so.
    owners[-1].from_dict(settings, str(path), inputs)
    return values
