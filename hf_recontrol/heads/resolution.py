"""Which head and which base are meant, by the names that a user gives."""

from __future__ import annotations

import os
from typing import NamedTuple

from torch import nn

from .hub import is_repo_id
from .value_head import ValueHead


class HeadAndBase(NamedTuple):
    """A loaded head, and where its base is."""

    value_head: nn.Module
    base: str | os.PathLike
    revision: str | None
    subfolder: str


def resolve_head_and_base(
    name_or_path: str | os.PathLike,
    value_head: nn.Module | str | os.PathLike | None = None,
    *,
    value_head_revision: str | None = None,
    value_head_subfolder: str = "",
    revision: str | None = None,
    subfolder: str = "",
    **hub_options,
) -> HeadAndBase:
    """
    Load a head and find its base.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A base model; or, without `value_head`, a head (folder or Hub repo) that knows its base model.
        value_head (`nn.Module`, `str` or `os.PathLike`, *optional*):
            The head, if the first argument names the base.
        value_head_revision, value_head_subfolder (`str`, *optional*):
            Where `value_head` is in its repo.
        revision, subfolder (`str`, *optional*):
            Where the first argument is in its repo. A base that the head names is taken at the revision that it names
            too, if none is given.
        hub_options:
            As for [`ValueHead.from_pretrained`]: `token`, `cache_dir`, ...

    Raises:
        `OSError`: if files cannot be loaded, or the base is a folder that is not there. `ValueError`: if the head does
        not say which base it is for, or is from the Hub and names a folder of this machine.
    """
    if value_head is not None:
        head = value_head
        if not isinstance(head, nn.Module):
            head = ValueHead.from_pretrained(
                value_head, revision=value_head_revision, subfolder=value_head_subfolder, **hub_options
            )
        return HeadAndBase(head, name_or_path, revision or revision_named(head, name_or_path), subfolder)
    head = ValueHead.from_pretrained(name_or_path, revision=revision, subfolder=subfolder, **hub_options)
    return base_of_head(head, name_or_path)


def revision_named(head: nn.Module, base: str | os.PathLike) -> str | None:
    """The commit of a base that a head was trained for, if it is the base that it names."""
    if not isinstance(head, ValueHead) or os.fspath(base) != head.config.base_model_name_or_path:
        return None
    return head.config.base_model_revision


def base_of_head(head: ValueHead, name_or_path: str | os.PathLike | None = None) -> HeadAndBase:
    """
    The base that a loaded head names, at the revision that it names.

    Args:
        head ([`ValueHead`]):
            The head.
        name_or_path (`str` or `os.PathLike`, *optional*):
            Where it was loaded from, if it was.

    Raises:
        `ValueError`: if it does not say which base it is for, or is from the Hub and names a folder of this machine.
        `OSError`: if it names a folder that is not there.
    """
    base = head.config.base_model_name_or_path
    named = "The head" if name_or_path is None else f"The head {name_or_path!s}"
    shown = "head" if name_or_path is None else repr(str(name_or_path))
    remedy = f"name the base yourself, such as `from_pretrained('org/base', value_head={shown})` (`--model`)."
    if base is None:
        raise ValueError(f"{named} does not say which model it is for: {remedy}")
    # What is both, a name on the Hub and a folder here, would be loaded from the folder.
    is_here = name_or_path is None or os.path.exists(name_or_path)
    if not is_here and (not is_repo_id(base) or os.path.exists(base)):
        raise ValueError(f"{named} comes from the Hub and names a base that does not, {base!r}: {remedy}")
    if not is_repo_id(base) and not os.path.isdir(base):
        raise OSError(f"{named} was trained for a base in the folder {base}, which is not there: {remedy}")
    return HeadAndBase(head, base, head.config.base_model_revision, "")
