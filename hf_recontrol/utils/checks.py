"""Checks of values that users give: each raises `ValueError` that names the field and what it must be."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from operator import eq
from typing import Any
from urllib.parse import parse_qsl, urlsplit

# Names of a URL's query that hold secrets, and how long a value without a meaning is.
_SECRET_NAMES = re.compile(r"key|token|secret|pass|auth|sig|cred|code", re.IGNORECASE)
_SECRET_LENGTH = 20
# More layers than any head needs; keeps a file that may be anybody's from asking for all the memory.
_MAX_LAYERS = 100


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> float:
    """A finite number from `low` to `high` that is larger than `above`, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"between {max(low, above):g} and {high:g}"
        raise ValueError(f"`{name}` must be {bounds}, got {value!r}.")
    if not value > above:
        raise ValueError(f"`{name}` must be above {above:g}, got {value!r}.")
    return float(value)


def check_numbers(name: str, value: Any, each: str, low: float = -math.inf) -> float | tuple[float, ...]:
    """A finite number, or a tuple of them for a sequence that holds one for each `each`; else `ValueError`."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return check_number(name, value, low)
    if not value:
        raise ValueError(f"`{name}` must hold one number for each {each}, got none.")
    return tuple(check_number(name, item, low) for item in value)


def check_int(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raise unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        bound = "" if low == -math.inf else f" of at least {low}"
        raise ValueError(f"`{name}` must be an integer{bound}, got {value!r}.")
    if value > high:
        raise ValueError(f"`{name}` must be at most {high}, got {value!r}.")


def check_widths(name: str, value: Any) -> list[int]:
    """Widths of layers, as a list."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"`{name}` must be a list of layer widths, got {value!r}.")
    if len(value) > _MAX_LAYERS:
        raise ValueError(f"`{name}` must hold at most {_MAX_LAYERS} layer widths, got {len(value)}.")
    for width in value:
        check_int(f"{name}[...]", width, low=1)
    return list(value)


def check_shapes(
    values: Mapping[str, Any],
    shapes: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    integers: Sequence[str] = (),
) -> None:
    """
    Raise unless each value is a tensor of its shape, and one of integers where it must be.

    Args:
        values (`dict[str, Any]`):
            The values, by name.
        shapes (`dict[str, tuple[str, ...]]`):
            What the dimensions of each are called.
        sizes (`dict[str, int]`):
            How large those dimensions are of which it is known.
        integers (sequence of `str`, *optional*):
            Names of those that hold integers.
    """
    for name, value in values.items():
        found, named = getattr(value, "shape", None), shapes[name]
        if found is not None and len(found) == len(named) and all(map(eq, found, map(sizes.get, named, found))):
            continue
        wanted = ", ".join(f"{sizes[each]} {each}" if each in sizes else each for each in named)
        got = type(value).__name__ if found is None else f"one of shape {tuple(found)}"
        raise ValueError(f"`{name}` must be a tensor of shape ({wanted}), got {got}.")
    for name in integers:
        dtype = getattr(values.get(name), "dtype", None)
        if dtype is not None and (dtype.is_floating_point or dtype.is_complex):
            raise ValueError(f"`{name}` must hold integers, got {dtype}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_text(name: str, value: Any, empty: bool = False) -> None:
    """Raise unless `value` is a text, which may be empty if `empty`. It is not shown: it may be a secret."""
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"`{name}` must be a text{'' if empty else ' that is not empty'}.")


def check_json(what: str, value: Any) -> str:
    """A value as JSON, with sorted names; `ValueError`, which begins with `what`, for one that JSON cannot hold."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} what JSON can hold ({error}).") from error


def check_digest(name: str, value: Any) -> None:
    """Raise unless `value` is a SHA-256 in hexadecimal digits."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"`{name}` must be a SHA-256 of 64 hexadecimal digits, got {value!r}.")


def check_no_secret(name: str, values: dict[str, Any], remedy: str) -> None:
    """Raise `ValueError` if a setting that is written to files holds a key or token."""
    ends = ("token", "api_key")
    if secret := [key for key, value in values.items() if isinstance(value, str) and str(key).endswith(ends)]:
        raise ValueError(f"`{name}` are written to files, so they must hold no {secret[0]!r}: {remedy}")


def check_endpoint_url(name: str, url: Any, key_setting: str) -> None:
    """
    Raise unless `url` is the URL of an endpoint without a secret in it, since it is written to files. It is not shown.
    The key belongs into the environment variable that `key_setting` names.
    """
    check_text(name, url)
    example = f"`{name}` must be a URL such as http://localhost:8000/v1."
    try:
        parts = urlsplit(url)
        _ = parts.port  # says so if it is no number
        secret = parts.username or parts.password or "@" in parts.netloc
        queried = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        raise ValueError(example) from None
    if secret or any(_SECRET_NAMES.search(key) or len(value) >= _SECRET_LENGTH for key, value in queried):
        raise ValueError(
            f"`{name}` must hold no user, password or key, since it is written to files: put the key into the "
            f"environment variable that `{key_setting}` names."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(example)


def check_variable_name(name: str, value: Any) -> None:
    """Raise unless `value` is the name of an environment variable, or `None`. It is not shown: it may be a key."""
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*", value)):
        raise ValueError(f"`{name}` must be the name of an environment variable, or null.")


def check_measured(name: str, value: Any) -> None:
    """
    Raise unless `value` is a `dict` of what was measured of a control: `control`, `criterion`, `prompts`, and of each
    of the `figures` its value and the ends of its interval; optionally for how many prompts all controls have numbers
    (`counted`), and how many the head was `trained_on`.
    """
    kinds = {"control": dict, "criterion": str, "prompts": int, "figures": dict}
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"`{name}` must be an object with {', '.join(kinds)}, got {value!r}.")
    for key in ("counted", "trained_on"):
        check_int(f"{name}[{key!r}]", value.get(key, 0), low=0)
    for figure, ends in value["figures"].items():
        if not isinstance(figure, str) or not isinstance(ends, list) or len(ends) != 3:
            raise ValueError(f"`{name}`: {figure!r} must be a list of a value and two ends, got {ends!r}.")
        for number in ends[:1] + [end for end in ends[1:] if end is not None]:
            check_number(f"{name}[{figure!r}]", number)
