"""The kinds of judges by the names that a comparison's file gives them, and judges of the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...utils.checks import check_json
from ...utils.imports import made, named_class
from .judge import Judge

if TYPE_CHECKING:
    from .person import PersonJudge

# Of each kind its module and class: imported when it is used.
KINDS = {
    "llm": ("endpoint", "EndpointJudge"),
    "local": ("local", "LocalJudge"),
    "person": ("person", "PersonJudge"),
}


def judge_of(given: Mapping[str, Any]) -> Judge | PersonJudge:
    """
    A judge from what a comparison's file says under `judge`.

    Raises:
        `ValueError`: for another kind, or settings that cannot be; names them.
    """
    kind = given.get("kind")
    if is_own_class(kind):
        return _own_judge(kind, own_settings(given))
    if not isinstance(kind, str) or kind not in KINDS:
        shown = "has no `kind`" if kind is None else "has a `kind` that there is not"
        raise ValueError(f"`judge` {shown}: it must be one of {', '.join(KINDS)}, or module:Class.")
    module, name = KINDS[kind]
    cls = getattr(importlib.import_module(f".{module}", __package__), name)
    return cls.of({name: value for name, value in given.items() if name != "kind"})


def is_own_class(kind: Any) -> bool:
    """Whether a kind is a class of the user's own."""
    return isinstance(kind, str) and ":" in kind


def own_settings(given: Any) -> dict[str, Any]:
    """What a class of the user's own is called with, of what is given as `judge`; of all else nothing."""
    if not isinstance(given, Mapping) or not is_own_class(given.get("kind")):
        return {}
    return {name: value for name, value in given.items() if name != "kind"}


def _own_judge(kind: str, settings: dict[str, Any]) -> Judge:
    cls = named_class(kind, Judge, "judge")
    check_json(f"The judge {kind!r}: its settings must be", settings)
    return made(cls, f"The judge {kind!r}", settings)
