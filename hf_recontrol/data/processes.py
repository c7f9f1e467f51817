"""The processes that share a stage's work, and how far they are."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from transformers.utils import logging

from ..utils.extras import needs_extra

# How often progress is told where it is no bar that moves.
_SECONDS_BETWEEN_LINES = 30
_LONGEST_WAIT = timedelta(days=7)

# Called with (done, total) as a stage gets on.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """A [`Progress`] that shows nothing."""


class Processes:
    """
    The processes that work on one stage: those of `accelerate launch`, else this one alone.

    Attributes:
        index, count (`int`):
            This process's number, and how many there are, over all machines.
        device (`torch.device`):
            Where this process computes by default.
    """

    def __init__(self):
        distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not distributed and importlib.util.find_spec("accelerate") is None:
            self._state = None
            self.index, self.count = 0, 1
            has_one = torch.accelerator.is_available()
            self.device = torch.accelerator.current_accelerator() if has_one else torch.device("cpu")
            return
        with needs_extra("train", "Work with several processes"):
            from accelerate import PartialState
        # Unless told that there is no accelerator, it does not connect processes that compute on CPUs.
        cpu = not torch.accelerator.is_available()
        # One process may have much more to do than another before they meet: the default is ten minutes.
        self._state = PartialState(cpu=cpu, **({"timeout": _LONGEST_WAIT} if distributed else {}))
        self.index, self.count = self._state.process_index, self._state.num_processes
        self.device = self._state.device

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def gather(self, value: Any) -> list:
        """The values of all processes, in their order, in every process."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' tensors, on the CPU, the same in every process."""
        if self.count == 1:
            return values.cpu()
        from accelerate.utils import reduce

        # Where the device lacks float64 the tensors cannot meet there.
        if values.dtype == torch.float64 and float64_device(self.device) != self.device:
            return torch.stack(self.gather(values.cpu())).sum(0)
        return reduce(values.to(self.device), "sum").cpu()


def device_of(given: str | None, name: str = "device") -> torch.device:
    """
    The device that a setting names, with its number; by default this process's.

    Raises:
        `ValueError`: if torch has no such device here; names the setting.
    """
    try:
        return torch.empty(0, device=given or Processes().device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`{name}` must be one that torch has here, got {given!r} ({error}).") from error


def float64_device(device: torch.device) -> torch.device:
    """Where what must be computed in float64 is, of tensors on a device: there, or on the CPU if it has no float64."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


@contextmanager
def progress_bar(
    description: str, total: int, progress: Progress | None = None, process_index: int = 0
) -> Iterator[Callable[[int], None]]:
    """
    A function that is called with how much more is done: it tells `progress`, else a bar, which only the first process
    shows; into a file, a line now and then.
    """
    if progress is None:
        seconds = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
        with logging.tqdm(total=total, desc=description, disable=process_index > 0, mininterval=seconds) as bar:
            yield bar.update
        return
    done = 0
    progress(done, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    yield advance
