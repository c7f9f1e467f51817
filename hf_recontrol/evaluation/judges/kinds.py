"""The kinds of judges by the names that a comparison's file gives them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .judge import Judge
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
    if not isinstance(kind, str) or kind not in KINDS:
        shown = "has no `kind`" if kind is None else "has a `kind` that there is not"
        raise ValueError(f"`judge` {shown}: it must be one of {', '.join(KINDS)}.")
    module, name = KINDS[kind]
    cls = getattr(importlib.import_module(f".{module}", __package__), name)
    return cls.of({name: value for name, value in given.items() if name != "kind"})
