"""Folders that long stages write: numbered parts, a manifest, a lock; shared by processes, resumed after any stop."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .._version import __version__
from ..configuration import ControlConfig, ValueHeadConfig
from ..heads.hub import portable_name
from ..utils.files import atomic_path, check_target, make_folder

MANIFEST_NAME = "manifest.json"
_PART_NAME = re.compile(r"part-\d{5,}\.\w+")
LOCK_NAME = ".lock"
# How often progress is told where it is no bar that moves.
_SECONDS_BETWEEN_LINES = 30
FORMAT_VERSION = 1

# Called with (done, total) as a stage gets on.
Progress = Callable[[int, int], None]


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
        try:
            from accelerate import PartialState
        except ImportError as error:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ImportError("Several processes need `pip install 'hf_recontrol[train]'`.") from error
            self._state = None
            self.index, self.count = 0, 1
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            return
        # One process may have much more to do than another before they meet: the default is ten minutes.
        distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
        # Unless told that there is no accelerator, it does not connect processes that compute on CPUs.
        cpu = not torch.accelerator.is_available()
        self._state = PartialState(cpu=cpu, **({"timeout": timedelta(days=7)} if distributed else {}))
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


def model_fingerprint(model: nn.Module) -> str:
    """
    A hash of the weights' names, shapes, dtypes and some values of each, and of which adapters act: tells another
    checkpoint in the same folder from this one without reading all of it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        if not tensor.is_meta:
            values = tensor.detach().flatten()
            digest.update(repr(values[:: max(1, len(values) // 64)].float().cpu().tolist()).encode())
    for name, module in model.named_modules():
        # PEFT's layers; of transformers' models it is a method.
        if isinstance(getattr(module, "disable_adapters", None), bool):
            digest.update(f"{name} {module.active_adapters} {module.disable_adapters}".encode())
    return digest.hexdigest()[:16]


def model_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one base model from another in the settings of a stage."""
    return {
        "model": portable_name(model.config._name_or_path),
        "model_revision": getattr(model.config, "_commit_hash", None),
        "model_fingerprint": model_fingerprint(model),
    }


def control_settings(model: PreTrainedModel, control: ControlConfig | bool) -> dict[str, Any]:
    """What tells one control of a model from another in the settings of a stage."""
    active = model.value_head_weights.items() if control is not False else ()
    return {
        "control": control.to_dict() if isinstance(control, ControlConfig) else control,
        "heads": {
            name: [weight, model_fingerprint(model.value_heads[name])] for name, weight in active if weight != 0
        },
    }


def place_settings(model: PreTrainedModel, config: ValueHeadConfig) -> dict[str, Any]:
    """What tells the states of one place of a model from those of another."""
    return {
        "hook_point": config.hook_point,
        "layer": config.layer,
        "base_model_name_or_path": portable_name(model.config._name_or_path),
        "base_model_revision": getattr(model.config, "_commit_hash", None),
    }


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        # Names from a file that may be anybody's: they are joined to the folder.
        odd = [name for name in manifest.get("parts", ()) if not _PART_NAME.fullmatch(name)]
        if odd:
            raise ValueError(f"it names the part {odd[0]!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the manifest of a stage ({error}): make it with `{command}`.") from error
    if found != kind:
        raise ValueError(f"{folder} holds {found}, not {kind}: make them with `{command}`.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} was made by another release of hf_recontrol: read it with that one, or upgrade.")
    if complete and not finished and manifest.get("rewards") is not None:
        raise ValueError(
            f"The {kind} in {folder} are not scored to the end: run the same `recontrol label` again, it goes on."
        )
    if complete and not finished:
        raise ValueError(f"The {kind} in {folder} are not finished: run the same `{command}` again, it goes on.")
    return manifest


class StageFolder:
    """
    A folder of numbered parts that one or several processes write, and a manifest.

    Each part is complete or absent, and what a part holds depends on its number alone, never on who writes it: a run
    that was stopped at any instant goes on with the parts that are missing, with as many processes as it likes.

    Args:
        path (`str` or `os.PathLike`):
            The folder.
        kind (`str`):
            What it holds: `"rollouts"` or `"states"`.
        settings (`dict`):
            Everything that the parts depend on. A run with others does not go on in the same folder.
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
        self._lock = None

    def __enter__(self) -> StageFolder:
        if self.processes.index == 0:
            check_target(self.path / MANIFEST_NAME)
            make_folder(self.path)
            self._lock = lock_folder(self.path)
            self._lock.__enter__()
            try:
                self._open()
            except BaseException:
                self._lock.__exit__(None, None, None)
                raise
        self.processes.wait()
        return self

    def __exit__(self, *error) -> None:
        if self._lock is not None:
            self._lock.__exit__(*error)

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

    def part_path(self, index: int) -> Path:
        """Path of a part, which may not exist yet."""
        return self.path / f"part-{index:05d}{self.suffix}"

    def is_counted(self) -> bool:
        """Whether an earlier run has written all parts and counted them."""
        manifest = json.loads((self.path / MANIFEST_NAME).read_text(encoding="utf-8"))
        return "counts" in manifest and all(self.part_path(i).is_file() for i in range(self.num_parts))

    def counts(self) -> dict[str, float]:
        """The counts that [`StageFolder.finish`] wrote."""
        return json.loads((self.path / MANIFEST_NAME).read_text(encoding="utf-8"))["counts"]

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
