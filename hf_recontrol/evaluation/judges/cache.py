"""Verdicts on the disk: what was paid for is not paid for again."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from ...utils.checks import check_int, check_number
from .judge import Verdict


class VerdictCache:
    """
    A file of verdicts, a line of JSON each. Threads and processes may share it: a verdict is written before the next
    question is asked, and no lock is held while a judge is asked.

    Args:
        path (`Path`):
            The file. It is made, in a folder that exists, with the first verdict.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, Verdict] = {}
        self._judges: set[str] = set()
        self._read = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> Verdict | None:
        """The verdict with this key, also if another process has written it meanwhile."""
        with self._lock:
            if key not in self._known:
                self._read_on()
            return self._known.get(key)

    def has_judge(self, judge: str) -> bool:
        """Whether it holds any verdict of a judge."""
        with self._lock:
            self._read_on()
            return judge in self._judges

    def add(self, key: str, judge: str, verdict: Verdict) -> None:
        """Write a verdict, which replaces an earlier one with its key."""
        line = json.dumps({"key": key, "judge": judge, **asdict(verdict)}).encode() + b"\n"
        with self._lock, FileLock(f"{self.path}.lock"), open(self.path, "ab+") as file:
            if file.tell() and _last_byte(file) != b"\n":
                # A run killed while writing left half a line.
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._known[key] = verdict
            self._judges.add(judge)

    def _read_on(self) -> None:
        """What was appended since the last time. Half a line, which another process may be writing, waits."""
        if not self.path.exists() or self.path.stat().st_size <= self._read:
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                key, judge = entry.pop("key"), entry.pop("judge")
                self._known[key] = _checked(Verdict(**entry))
                self._judges.add(judge)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue


def _checked(verdict: Verdict) -> Verdict:
    """A verdict from a file that may be damaged; `ValueError` if it is none."""
    if verdict.value is not None:
        check_number("value", verdict.value)
    for name in ("calls", "input_tokens", "output_tokens", "retries"):
        check_int(name, getattr(verdict, name), low=0)
    return verdict


def _last_byte(file) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)
