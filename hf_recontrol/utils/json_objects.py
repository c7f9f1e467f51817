"""Objects from JSON files that may be of another version, or anybody's."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


def known_items(cls: type, values: Any, source: str) -> dict[str, Any]:
    """The items of `values` that are fields of `cls`; the others are warned about, so that files of a newer version
    still load."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(values).__name__}.")
    known = {field.name for field in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        logger.warning(f"{source}: ignored unknown {cls.__name__} keys {unknown}.")
    return {key: value for key, value in values.items() if key in known}
