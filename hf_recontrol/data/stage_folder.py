"""Folders that long stages write: numbered parts, a manifest, a lock; shared by processes, resumed after any stop."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .._version import __version__
from ..utils.files import atomic_path, check_target, make_folder, read_json
from .fingerprints import file_checksum
from .processes import Processes, Progress

MANIFEST_NAME = "manifest.json"
_PART_NAME = re.compile(r"part-\d{5,}\.\w+")
LOCK_NAME = ".lock"
FORMAT_VERSION = 1


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """
    Keep other runs out of a folder. The lock goes with the process, also when it is killed.

    Raises:
        `OSError`: if another run holds it.
    """
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OSError(
            f"Another run is working in {folder}: wait until it has ended, or name another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def shared_folder(folder: Path) -> Iterator[None]:
    """
    A folder for all processes of a run: the first one makes and locks it, the others wait for that.

    Raises:
        `OSError`: if it cannot be made, or another run holds it.
    """
    processes = Processes()
    with lock_folder(make_folder(folder)) if processes.index == 0 else nullcontext():
        processes.wait()
        yield


def _versions() -> dict[str, str]:
    versions = {"hf_recontrol": __version__, "python": platform.python_version()}
    for name in ("transformers", "torch", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def read_manifest(folder: str | os.PathLike, kind: str, command: str, complete: bool = True) -> dict[str, Any]:
    """
    The manifest of a stage, which must be finished if `complete`.

    Raises:
        `OSError`, `ValueError`: if the folder does not hold what `command` makes, or it is not finished.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise OSError(f"{folder} holds no {MANIFEST_NAME}: make it with `{command}`.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found, finished = manifest["kind"], manifest["complete"]
        # Of another stage, or of another release, the messages below say more.
        is_ours = found == kind and manifest.get("format_version") == FORMAT_VERSION
        parts = manifest["parts"] if finished and is_ours else manifest.get("parts", {})
        # Names from a file that may be anybody's: they are joined to the folder.
        if odd := [name for name, _ in parts.items() if not _PART_NAME.fullmatch(name)]:
            raise ValueError(f"it names the part {odd[0]!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the manifest of a stage ({error}): make it with `{command}`.") from error
    if found != kind:
        raise ValueError(f"{folder} holds {found}, not {kind}: make them with `{command}`.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} was made by another release of hf_recontrol: read it with that one, or upgrade.")
    if complete and not finished and "counts" in manifest and manifest.get("rewards") is not None:
        raise ValueError(
            f"The {kind} in {folder} are not scored to the end: run the same command again (`recontrol label`, or "
            "`fit`) to resume."
        )
    if complete and not finished:
        raise ValueError(
            f"The {kind} in {folder} are not finished: run the same command again (`{command}`, or `fit`) to resume."
        )
    return manifest


def made_by(command: str, then: str = "") -> str:
    """How a message names what makes a stage: alone, or all stages of a run."""
    return f"the same command that made it (`{command}`{then}, or `fit`)"


def hold_parts(
    folder: Path,
    parts: Mapping[str, str | None],
    command: str,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> None:
    """
    Hold parts against the checksums that their manifest has of them; names all that do not fit.

    Args:
        folder (`Path`), parts (`Mapping[str, str | None]`):
            Where they are, and the checksum of each by its name.
        command (`str`):
            What is to be run where a part is missing or another one.
        processes ([`Processes`], *optional*):
            Those that share the reading. All must call this, and an error is raised in each. By default this process
            reads all.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total), the parts of this process.

    Raises:
        `OSError`: if parts are missing. `ValueError`: if some are other files.
    """
    own = list(parts) if processes is None else list(parts)[processes.index :: processes.count]
    missing, changed = [], []
    for number, name in enumerate(own, 1):
        if not (folder / name).is_file():
            missing.append(name)
        elif file_checksum(folder / name) != parts[name]:
            changed.append(name)
        if progress is not None:
            progress(number, len(own))
    if processes is not None:
        found = processes.gather((missing, changed))
        missing, changed = (sorted(name for each in found for name in each[i]) for i in range(2))
    if changed:
        lacks = f"It lacks {', '.join(missing)}. " if missing else ""
        verb, they, them = ("was", "it is", "it") if len(changed) == 1 else ("were", "they are", "them")
        raise ValueError(
            f"{folder / ', '.join(changed)} {verb} changed or damaged: {they} not what its {MANIFEST_NAME} names. "
            f"{lacks}Put back what was there, or remove {them} and run {command}."
        )
    if missing:
        raise OSError(f"{folder} lacks {', '.join(missing)}, which its {MANIFEST_NAME} names: run {command}.")


def checked_parts(
    folder: str | os.PathLike,
    kind: str,
    command: str,
    then: str = "",
    *,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """
    The parts of a finished stage, in their order, held against the checksums in its manifest: all of them are read.

    Args:
        command (`str`), then (`str`, *optional*):
            What makes the folder, and what is to be run behind it where a part was made anew.
        processes, progress (*optional*):
            As for [`hold_parts`].

    Raises:
        `OSError`, `ValueError`: as [`read_manifest`]; if parts are missing, or are not those that the manifest names.
    """
    parts = read_manifest(folder, kind, command)["parts"]
    hold_parts(Path(folder), parts, made_by(command, then), processes, progress)
    return [Path(folder, name) for name in sorted(parts)]


class StageFolder:
    """
    A folder of numbered parts that one or several processes write, and a manifest.

    Each part is complete or absent, and what a part holds depends on its number alone, never on who writes it: a run
    that was stopped at any instant resumes with the parts that are missing, with as many processes as it likes.

    Args:
        path (`str` or `os.PathLike`):
            The folder.
        kind (`str`):
            What it holds: `"rollouts"` or `"states"`.
        settings (`dict`):
            Everything that the parts depend on. A run with others is refused in the same folder.
        num_parts (`int`), suffix (`str`):
            How many parts there are, and how their names end.

    Use as a context manager: it holds the folder's lock.

    Raises:
        `OSError`: if the folder cannot be written, or another run works in it. `ValueError`: if it was made with other
        settings; names them.
    """

    def __init__(self, path: str | os.PathLike, kind: str, settings: dict[str, Any], num_parts: int, suffix: str):
        self.path, self.kind, self.num_parts, self.suffix = Path(path), kind, num_parts, suffix
        # As JSON gives them back: tuples are lists there.
        self.settings = json.loads(json.dumps(settings))
        self.processes = Processes()
        self._held = ExitStack()
        self._was_counted = False

    def __enter__(self) -> StageFolder:
        with ExitStack() as held:
            if self.processes.index == 0:
                check_target(self.path / MANIFEST_NAME)
                held.enter_context(lock_folder(make_folder(self.path)))
                self._open()
            self.processes.wait()
            self._resume()
            self._held = held.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._held.close()

    def _open(self) -> None:
        path = self.path / MANIFEST_NAME
        if path.exists():
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                known = manifest["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error}): name another folder, or remove this one.") from error
            if manifest.get("kind") != self.kind:
                raise ValueError(f"{self.path} holds {manifest.get('kind')}, not {self.kind}: name another folder.")
            check_settings(self.path, known, self.settings)
        else:
            if stray := sorted(self.path.glob(f"part-*{self.suffix}")):
                raise ValueError(
                    f"{self.path} holds {stray[0].name} without a {MANIFEST_NAME}, so nobody knows what it is: name "
                    "another folder."
                )
            self.write_manifest({"complete": False})
        # What a killed run was writing.
        for unfinished in self.path.rglob(".part-*"):
            unfinished.unlink(missing_ok=True)

    def _resume(self) -> None:
        """
        See what an earlier run finished. Of a finished folder that lacks parts those that are left must be what the
        manifest names; it forgets the others, which are written anew and need not have the same bytes.
        """
        manifest = read_json(self.path / MANIFEST_NAME)
        known = manifest.get("parts") or {}
        present = {path.name for path in map(self.part_path, range(self.num_parts)) if path.is_file()}
        self._was_counted = "counts" in manifest and len(present) == self.num_parts and present == known.keys()
        # Before anyone writes a part that is missing.
        self.processes.wait()
        if self._was_counted or not known:
            return
        # A scoring that was stopped has replaced some parts, and has not said which.
        is_valid = manifest.get("complete") or "counts" not in manifest
        kept = {name: checksum for name, checksum in known.items() if is_valid and name in present}
        hold_parts(self.path, kept, "the same command", self.processes)
        if self.processes.index == 0:
            manifest.pop("counts", None)
            self.write_manifest(manifest | {"complete": False, "parts": kept})
        self.processes.wait()

    def part_path(self, index: int) -> Path:
        """Path of a part, which may not exist yet."""
        return self.path / f"part-{index:05d}{self.suffix}"

    def is_counted(self) -> bool:
        """Whether all parts were there, written and counted by an earlier run, when this one opened the folder."""
        return self._was_counted

    def check_counted(self) -> None:
        """Raise `ValueError` in every process if parts are not those that were counted."""
        hold_parts(self.path, read_json(self.path / MANIFEST_NAME)["parts"], "the same command", self.processes)

    def counts(self) -> dict[str, float]:
        """The counts that [`StageFolder.finish`] wrote."""
        return read_json(self.path / MANIFEST_NAME)["counts"]

    def own_parts(self) -> list[int]:
        """The parts that this process is to write or has written."""
        return list(range(self.processes.index, self.num_parts, self.processes.count))

    def missing_parts(self) -> list[int]:
        """Those of [`StageFolder.own_parts`] that do not exist yet."""
        return [index for index in self.own_parts() if not self.part_path(index).is_file()]

    def write_manifest(self, values: dict[str, Any]) -> None:
        """Write the manifest: format, versions and settings, and `values`."""
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "versions": _versions(),
            "settings": self.settings,
            "num_parts": self.num_parts,
        }
        with atomic_path(self.path / MANIFEST_NAME) as temporary:
            temporary.write_text(json.dumps(manifest | values, indent=2) + "\n", encoding="utf-8")

    def finish(self, count_part: Callable[[Path], dict[str, float]], more: dict[str, Any] | None = None) -> dict:
        """
        Wait for all processes, then write the manifest with each part's checksum and the sums of what `count_part`
        says of it.

        Returns:
            The counts, in every process.
        """
        own = [(path.name, file_checksum(path), count_part(path)) for path in map(self.part_path, self.own_parts())]
        parts = sorted(part for process in self.processes.gather(own) for part in process)
        counts: dict[str, float] = {}
        for _, _, count in parts:
            for name, value in count.items():
                counts[name] = counts.get(name, 0) + value
        if self.processes.index == 0:
            checksums = {name: checksum for name, checksum, _ in parts}
            self.write_manifest({"complete": True, "counts": counts, "parts": checksums} | (more or {}))
        self.processes.wait()
        return counts


def check_settings(folder: Path, known: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise `ValueError` that names every setting in which a run differs from the one that made `folder`."""
    before, now = _flat(known), _flat(settings)
    changed = [
        f"{name} was {_shown(before.get(name))}, is {_shown(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{folder} was made with other settings: {'; '.join(changed)}. Nothing was changed: name another folder, "
            "or remove this one."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _shown(value: Any) -> str:
    is_checksum = isinstance(value, str) and len(value) >= 16 and set(value) <= set("0123456789abcdef")
    return f"{value[:8]}... (a checksum)" if is_checksum else repr(value)
