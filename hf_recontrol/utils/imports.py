"""What users name as `module:name`: imported from where Python looks, and from the current folder."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

Made = TypeVar("Made")


def named_module(name: str) -> ModuleType:
    """A module by its name, also one in the current folder, where the command `recontrol` does not look by itself."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(name)


def made(cls: type[Made], what: str, settings: Mapping[str, Any], *arguments: Any) -> Made:
    """
    An object of a class with the settings of a file.

    Raises:
        `ValueError`: if the class does not take these settings; begins with `what`.
    """
    try:
        inspect.signature(cls).bind(*arguments, **settings)
    except TypeError as error:
        raise ValueError(f"{what}: {error}.") from error
    return cls(*arguments, **settings)


def named_class(given: str, parent: type, what: str) -> type:
    """
    A class of the user's own.

    Args:
        given (`str`):
            `module:Class`.
        parent (`type`):
            What it must derive from, a public name of this package.
        what (`str`):
            What it is called in messages.

    Raises:
        `ValueError`: if there is no such class.
    """
    module, _, name = given.partition(":")
    try:
        found = getattr(named_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"The {what} {given!r} cannot be imported: {error}.") from error
    if not inspect.isclass(found) or not issubclass(found, parent):
        raise ValueError(f"{given!r} is no class that derives from `hf_recontrol.{parent.__name__}`.")
    return found
