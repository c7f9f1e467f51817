"""What all settings of a run share: one name, one default, one text and one check for Python, YAML and the command."""

from __future__ import annotations

import difflib
import inspect
import math
import textwrap
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from .checks import check_choice, check_int, check_number

_WORDS = {bool: "True or False", str: "a text", dict: "a dict"}
_LISTED = {str: "texts", int: "integers", float: "numbers"}
SettingsType = TypeVar("SettingsType", bound="Settings")


def setting(default: Any, help: str, **bounds: Any) -> Any:
    """
    A field with its text.

    Args:
        default:
            Its default.
        help (`str`):
            What it does, and when to change it.
        bounds:
            `low`, `high`, `above`: what a number must be; `default_text`: how the default is described where the value
            itself says little; `escapes`: whether `\\n` and the like stand for characters in the command's option;
            `secret`: whether it is never shown or written.
    """
    metadata = {"help": help, **bounds}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata, repr=not metadata.get("secret"))


@cache
def annotations(cls: type) -> dict[str, Any]:
    """The types of a class's settings, by name."""
    return typing.get_type_hints(cls)


def kind_of(annotation: Any) -> tuple[Any, bool]:
    """(the type without `None`, whether `None` is allowed) of a setting's annotation."""
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal or type(None) not in options:
        return annotation, False
    return next(option for option in options if option is not type(None)), True


def default_text(item: Field) -> str:
    """A setting's default, as help and documentation show it."""
    if "default_text" in item.metadata:
        return item.metadata["default_text"]
    default = item.default if item.default is not MISSING else None
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    return "none" if default is None else str(default)


def settings_class(panel: str) -> Callable[[type], type]:
    """
    Decorates a class of settings: makes it a frozen dataclass whose docstring lists all of its settings.

    Args:
        panel (`str`):
            The heading under which the command's help shows the settings that the class adds.
    """

    def decorate(cls: type) -> type:
        cls.panels = dict.fromkeys(inspect.get_annotations(cls), panel)
        return _documented(dataclass(frozen=True, kw_only=True)(cls))

    return decorate


def panel_of(cls: type, name: str) -> str:
    """Under which heading help shows a setting: that of the class which added it."""
    return next(base.panels[name] for base in cls.__mro__ if name in base.__dict__.get("panels", {}))


def _documented(cls: type) -> type:
    lines = []
    for item in fields(cls):
        text = f"{item.metadata['help']} Default: {default_text(item)}."
        lines += [f"    {item.name}:", textwrap.indent(textwrap.fill(text, 107), " " * 8)]
    cls.__doc__ = textwrap.dedent(cls.__doc__).strip() + "\n\nArgs:\n" + "\n".join(lines) + "\n"
    return cls


def _plain(value: Any) -> Any:
    """A value as YAML and JSON hold it."""
    return list(value) if isinstance(value, tuple) else value


class Settings:
    """
    What all settings share: checks of types and ranges when they are made, and the way to and from a `dict`.

    Raises:
        `TypeError`, `ValueError`: for a value of the wrong type or out of its range; names the setting.
    """

    def __post_init__(self):
        for item in fields(self):
            value = _checked(item, annotations(type(self))[item.name], getattr(self, item.name))
            object.__setattr__(self, item.name, value)

    # What was given for the settings that others filled in, by name.
    _given = MappingProxyType({})

    def fill(self, name: str, value: Any) -> None:
        """Set a setting that was left open, as others have it. Where those change later, it is open again."""
        object.__setattr__(self, "_given", {**self._given, name: getattr(self, name)})
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls: type[SettingsType], settings: SettingsType | None, changes: Mapping[str, Any]) -> SettingsType:
        """
        Given settings, by default all defaults, with `changes`.

        Raises:
            `TypeError`: if there is no such setting, or `settings` are others; `ValueError` as for the class.
        """
        if settings is not None and not isinstance(settings, cls):
            raise TypeError(f"`settings` must be {cls.__name__}, got {type(settings).__name__}.")
        known = [item.name for item in fields(cls if settings is None else settings)]
        for name in changes:
            if name not in known:
                raise TypeError(f"There is no setting {name!r} here{_similar(name, known)}.")
        return cls(**changes) if settings is None else replace(settings, **{**settings._given, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The settings as YAML and JSON hold them: lists for tuples, and no secret."""
        return {
            item.name: _plain(getattr(self, item.name)) for item in fields(self) if not item.metadata.get("secret")
        }

    @classmethod
    def choices(cls, name: str) -> tuple[str, ...]:
        """The values that a setting with a fixed set of them can have."""
        return typing.get_args(annotations(cls)[name])

    @classmethod
    def from_dict(
        cls: type[SettingsType], values: Mapping[str, Any], source: str, others: Collection[str] = ()
    ) -> SettingsType:
        """
        Settings from what a YAML or JSON file holds.

        Args:
            values (mapping):
                By name; what is missing is the default.
            source (`str`):
                Named in messages.
            others (collection of `str`, *optional*):
                What the source may hold beside settings: offered where a name is unknown.

        Raises:
            `ValueError`: for an unknown name or a bad value; names `source` and the setting.
        """
        types = annotations(cls)
        if unknown := [name for name in values if name not in types]:
            raise ValueError(
                f"{source}: there is no setting {unknown[0]!r}{_similar(str(unknown[0]), [*others, *types])}."
            )
        try:
            return cls(**{name: number_of_text(types[name], value) for name, value in values.items()})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error


def _similar(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f": it must be one of {', '.join(sorted(known))}"


def number_of_text(annotation: Any, value: Any) -> Any:
    """A number that YAML 1.1 takes for a text, such as 3e-4, where the annotation has numbers; else the value."""
    kind = kind_of(annotation)[0]
    if isinstance(value, str) and (kind is float or typing.get_args(kind)[:1] == (float,)):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _checked(item: Field, annotation: Any, value: Any) -> Any:
    """A value of a setting as its type has it; `TypeError` or `ValueError` that names the setting."""
    name, bounds = item.name, item.metadata
    kind, optional = kind_of(annotation)
    if kind is Any or (value is None and optional):
        return value
    if typing.get_origin(kind) is Literal:
        check_choice(name, value, typing.get_args(kind))
        return value
    if typing.get_origin(kind) is tuple:
        return _checked_tuple(name, typing.get_args(kind)[0], value, bounds)
    if kind is int:
        check_int(name, value, bounds.get("low", -math.inf), bounds.get("high", math.inf))
        return value
    if kind is float:
        return check_number(name, value, **{key: bounds[key] for key in ("low", "high", "above") if key in bounds})
    if not isinstance(value, kind):
        found = type(value).__name__ if bounds.get("secret") else repr(value)
        raise TypeError(f"`{name}` must be {_WORDS[kind]}, got {found}.")
    return value


def _checked_tuple(name: str, item_type: type, value: Any, bounds: Mapping[str, Any]) -> tuple:
    values = (value,) if isinstance(value, item_type) else value
    if item_type is float and isinstance(value, int):
        values = (value,)
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"`{name}` must be a list of {_LISTED[item_type]}, got {value!r}.")
    if item_type is float:
        limits = {key: bounds[key] for key in ("low", "high", "above") if key in bounds}
        return tuple(check_number(f"{name}[...]", number_of_text(float, each), **limits) for each in values)
    for each in values:
        if item_type is int:
            check_int(f"{name}[...]", each, bounds.get("low", -math.inf))
        elif not isinstance(each, item_type):
            raise TypeError(f"`{name}` must be a list of texts, got {value!r}.")
        elif not each:
            raise ValueError(f"`{name}` must hold texts that are not empty, got {value!r}.")
    return tuple(values)
