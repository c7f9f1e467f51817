"""The kinds of rivals by the names that a comparison's file gives them, and rivals of the user's own."""

from __future__ import annotations

import importlib
from typing import Any

from ...utils.imports import made, named_class
from .rival import Bench, Rival

# Of each kind its module and class: imported when it is used.
KINDS = {
    "base": ("plain", "Base"),
    "prompting": ("plain", "Base"),
    "best_of_n": ("plain", "BestOfN"),
    "ascent": ("controls", "Ascent"),
    "advantage": ("controls", "Advantage"),
    "static_vector": ("controls", "StaticVector"),
    "steering_vector": ("steering", "SteeringVector"),
    "cd_prefix": ("decoding", "PrefixDecoding"),
    "cd": ("decoding", "RewardDecoding"),
    "lora_dpo": ("lora", "DpoLora"),
}


def is_own_class(kind: str) -> bool:
    """Whether a kind is a class of the user's own."""
    return kind not in KINDS


def rival_class(kind: str) -> type[Rival]:
    """
    The class of a kind: one of [`KINDS`], or `module:Class`.

    Raises:
        `ValueError`: if there is none; names those there are.
    """
    if kind in KINDS:
        module, name = KINDS[kind]
        return getattr(importlib.import_module(f".{module}", __package__), name)
    if ":" not in kind:
        raise ValueError(
            f"There is no control of the kind {kind!r}: it must be one of {', '.join(KINDS)}, or module:Class."
        )
    return named_class(kind, Rival, "control")


def make_rival(kind: str, bench: Bench, settings: dict[str, Any]) -> Rival:
    """
    A rival of a kind.

    Raises:
        `ValueError`: as [`rival_class`]; for settings that it does not have, or that cannot work.
    """
    return made(rival_class(kind), f"The control {kind!r}", settings, bench)
