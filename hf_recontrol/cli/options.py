"""The command's options, made from the settings of a run: the same names, defaults and texts."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ..utils.setting_fields import Settings, annotations, default_text, kind_of, panel_of

ConfigOption = Annotated[
    Path | None,
    typer.Option(help="YAML file of settings, such as the `fit.yaml` of a run. Options override it."),
]


def _option(cls: type[Settings], item: Field) -> inspect.Parameter:
    """The option of a setting. Its default is `None`, not given, so that a file's value can stand."""
    kind, optional = kind_of(annotations(cls)[item.name])
    name = item.name.replace("_", "-")
    declaration = f"--{name}/--no-{name}" if kind is bool else f"--{name}"
    shown: Any = kind
    metavar = None
    if kind in (Any, dict):
        shown, metavar = str, "JSON" if kind is dict else "TEXT"
    elif typing.get_origin(kind) is tuple:
        shown, metavar = {
            str: (list[str], "TEXT ..."),
            int: (str, "INT,INT,..."),
            float: (str, "FLOAT,FLOAT,..."),
        }[typing.get_args(kind)[0]]
    elif optional and kind in (int, float):
        shown, metavar = str, "INTEGER|none" if kind is int else "FLOAT|none"
    option = typer.Option(
        declaration,
        help=item.metadata["help"],
        show_default=default_text(item),
        metavar=metavar,
        rich_help_panel=panel_of(cls, item.name),
    )
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[shown | None, option]
    )


def _parsed(cls: type[Settings], item: Field, value: Any) -> Any:
    """What an option's text stands for. Where it stands for nothing, it is left to the settings' own check."""
    kind, optional = kind_of(annotations(cls)[item.name])
    option = "--" + item.name.replace("_", "-")
    if optional and value == "none":
        return None
    if kind in (int, float) and isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            raise typer.BadParameter(f"expected a number or none, got {value!r}", param_hint=option) from None
    if kind is dict:
        try:
            return json.loads(value)
        except ValueError as error:
            raise typer.BadParameter(f"expected a JSON object ({error})", param_hint=option) from None
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] in (int, float):
        item_type = typing.get_args(kind)[0]
        expected = "widths such as 512 or 512,512" if item_type is int else "numbers such as 0.1 or 0.05,0.1"
        try:
            return [item_type(number) for number in value.split(",") if number.strip()]
        except ValueError:
            raise typer.BadParameter(f"expected {expected}, got {value!r}", param_hint=option) from None
    if item.metadata.get("escapes"):
        return [text.encode("latin-1", "backslashreplace").decode("unicode_escape") for text in value]
    return value


def with_settings(
    cls: type[Settings], from_file: bool = True, inputs: Mapping[str, str] | None = None
) -> Callable[[Callable], Callable]:
    """
    Decorates a command: gives it an option for each setting of `cls` and, unless `from_file` is false, `--config`, and
    hands its function the `settings` that come of them; options override the file. A function that also takes `inputs`
    is handed what the file holds beside settings: `inputs`, see [`load_run`].
    """

    def decorate(function: Callable) -> Callable:
        declared = inspect.signature(function, eval_str=True).parameters
        own = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in declared.values()
            if p.name not in ("settings", "inputs")
        ]
        items = {item.name: item for item in fields(cls)}

        @wraps(function)
        def command(*, config: Path | None = None, **values: Any) -> None:
            given = {
                name: _parsed(cls, items[name], values[name]) for name in items if values.get(name) not in (None, [])
            }
            source, loaded = "The options", {}
            if config is not None:
                from ..pipelines.run_file import load_run

                source, loaded = f"{config} and the options", load_run(config, cls, inputs)
            settings = cls.from_dict({name: loaded[name] for name in items if name in loaded} | given, source)
            arguments = {p.name: values[p.name] for p in own}
            if "inputs" in declared:
                arguments["inputs"] = {name: value for name, value in loaded.items() if name not in items}
            function(settings=settings, **arguments)

        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigOption)
        parameters = [*own, *([config] if from_file else []), *(_option(cls, item) for item in items.values())]
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def merged_inputs(inputs: Mapping[str, Any], given: Mapping[str, Any], needed: Mapping[str, str]) -> dict[str, Any]:
    """
    What a command works on: what its file holds beside settings, and above that the options.

    Args:
        inputs (`dict`):
            Of the file, by name.
        given (`dict`):
            The options' values, by the same names; what is empty was not given.
        needed (`dict[str, str]`):
            Names of those that must be there, with their options.

    Raises:
        `typer.BadParameter`: names the options of those that are missing.
    """
    inputs = {**inputs, **{name: value for name, value in given.items() if value}}
    if missing := [option for name, option in needed.items() if name not in inputs]:
        raise typer.BadParameter(
            f"missing; give {', '.join(missing)} here or in the file of --config", param_hint=missing[0]
        )
    return inputs


ModelOption = Annotated[str, typer.Option("--model", "-m", help="Base model: a folder or a Hub name.")]
PromptsOption = Annotated[
    str,
    typer.Option(
        help="JSONL, JSON, CSV or Parquet file, or a folder or Hub name that `datasets` loads; rows with `prompt`: a "
        "text or chat messages."
    ),
]
RewardOption = Annotated[
    list[str],
    typer.Option(
        help="`module:function` (called by keyword, as in TRL: `f(completions, **columns) -> list[float]`), a "
        "column's name, or the folder or Hub name of a sequence classifier (`name#LABEL` if it has several labels). "
        "Several give several objectives, or one: `--combine-rewards`."
    ),
]
HeadOption = Annotated[str | None, typer.Option(help="Work under the control that this head recommends.")]
