"""What stored states take: how densely they are kept for a budget, whether the disk has room, what is in a file."""

from __future__ import annotations

import shutil
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers.utils import logging

from ..data.rollouts import response_lengths
from ..data.states import WIDE, States

logger = logging.get_logger(__name__)

# What is counted of the error of each tensor.
_SQUARED_ERROR = {name: "int8_squared_error" + (f" {name}" if name != "hidden" else "") for name in WIDE}
# Beyond this share of the features' spread int8 is not worth what it saves.
_LARGE_INT8_ERROR = 0.05


def _num_states(lengths: np.ndarray, every: int) -> int:
    """How many states are kept of responses of so many tokens: of each the last one, and every k-th before it."""
    return int((-(-lengths // every)).sum())


def _lengths(parts: Sequence[Path]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *map(response_lengths, parts)])


def smallest_every(parts: Sequence[Path], bytes_a_state: int, max_gigabytes: float) -> int:
    """
    The smallest k of which every k-th state of the scored responses in Parquet files fits into so many 10⁹ bytes.

    Raises:
        `ValueError`: if not even the last states alone fit.
    """
    lengths = _lengths(parts)
    longest = int(lengths.max(initial=1))
    every = 1 + bisect_left(
        range(1, longest + 1),
        True,
        key=lambda k: _num_states(lengths, k) * bytes_a_state <= max_gigabytes * 1e9,
    )
    if every > longest:
        least = _num_states(lengths, longest) * bytes_a_state / 1e9
        raise ValueError(
            f"`max_gigabytes` is {max_gigabytes:g}, and one state of each response takes {least:.3g}: raise it, or "
            "take another `states_dtype`."
        )
    return every


def warn_of_full_disk(folder: Path, missing: Sequence[Path], bytes_a_state: int, every: int) -> None:
    """Warn if a folder's disk has no room for the states of the Parquet files that are still to be read."""
    needed, free = _num_states(_lengths(missing), every) * bytes_a_state, shutil.disk_usage(folder).free
    if needed > free:
        logger.warning(
            f"The states that are still to be written take {needed / 1e9:.3g} GB, and the disk of {folder} has "
            f"{free / 1e9:.3g} GB left: make room, or keep fewer (`max_gigabytes`, `every`, `states_dtype`, no "
            "`directions`)."
        )


def count_states(path: Path) -> dict[str, float]:
    """What a file of states holds, see [`write_states`]."""
    states = States.open(path)
    wide = {name: tensor for name in WIDE if (tensor := getattr(states, name)) is not None}
    size = sum(tensor.numel() * tensor.element_size() for tensor in wide.values())
    counts = {"episodes": len(states.lengths), "states": len(states.hidden), "bytes": size}
    errors = [] if states.int8_error is None else states.int8_error.tolist()
    for name, error in zip(wide, errors, strict=False):
        counts[_SQUARED_ERROR[name]] = error**2 * len(states.hidden)
    return counts


def int8_errors(counts: dict[str, float]) -> dict[str, float]:
    """
    Root mean square error of each tensor that is stored as int8, by its name, relative to each feature's spread; by
    the counts of [`write_states`].
    """
    return {name: (counts[key] / counts["states"]) ** 0.5 for name, key in _SQUARED_ERROR.items() if key in counts}


def warn_of_int8(counts: dict[str, float]) -> None:
    """Warn of tensors that int8 keeps badly, by the counts of [`write_states`]."""
    large = {name: error for name, error in int8_errors(counts).items() if error > _LARGE_INT8_ERROR}
    if large:
        shown = ", ".join(f"`{name}` {error:.1%}" for name, error in large.items())
        logger.warning(f"int8 keeps these states badly: its error is {shown} of each feature's spread. Use bfloat16.")
