"""Writing files so that no reader sees half of one and no interruption costs the old one."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike):
    """
    A temporary path beside `path` that is renamed to `path` when the block ends well and removed when it does not, so
    that a reader never sees half a file and an interrupted write never costs the old one.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(temporary)
    try:
        yield temporary
        # mkstemp and safetensors make files that only their owner can read, whatever the user's umask allows.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: str | os.PathLike) -> Path:
    """Create a folder to save in.

    Raises:
        `OSError`: if `path` is a file, or cannot be created.
    """
    path = Path(path)
    _check_home(path)
    if path.is_file():
        raise OSError(f"{path} is a file: name a folder to save in.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _check_home(path: Path) -> None:
    if path.parts[:1] == ("~",):
        raise OSError(f"{path} would be a folder that is called '~', in {Path.cwd()}: write the whole path.")


def check_target(path: str | os.PathLike) -> None:
    """
    Check that a file can be written at `path`, before the long work whose result it is to hold.

    Raises:
        `OSError`: if `path` is a folder, or stands in no folder that can be made and written; says which.
    """
    path = Path(path)
    _check_home(path)
    if path.is_dir():
        raise OSError(f"{path} is a folder: name a file to write.")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise OSError(f"{existing} is a file, so {path} cannot be written.")
    if not os.access(existing, os.W_OK):
        raise OSError(f"{existing} cannot be written to.")


def check_holds_no(folder: Path, others: Mapping[str, str]) -> None:
    """
    Check that a folder was not made by another command, whose files this one would replace.

    Args:
        folder (`Path`):
            It need not exist.
        others (mapping of `str` to `str`):
            Names of files that others leave there, and what such a folder holds.

    Raises:
        `OSError`: if one of them is there; names it.
    """
    for name, what in others.items():
        if (folder / name).exists():
            raise OSError(f"{folder} holds {what} ({name}), whose files this would replace: name another `output`.")


_COMBINED = re.compile(r"(\w+ of )(.+)", re.DOTALL)


def without_place(name: str) -> str:
    """
    A name that others may read: of a folder its own name, where it is on this machine is nobody's business. The folder
    may have a `#LABEL` behind it, or be one of several rewards that were combined (`mean of A, B`).
    """
    if combined := _COMBINED.fullmatch(name):
        return combined[1] + ", ".join(map(without_place, combined[2].split(", ")))
    folder, *label = [name] if Path(name).is_dir() else name.split("#", 1)
    return "#".join([Path(folder).resolve().name, *label]) if Path(folder).is_dir() else name


def read_json(path: Path) -> dict:
    """The object in a JSON file that this package wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: dict) -> None:
    """Write an object as a JSON file, or nothing at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
