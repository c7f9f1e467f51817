"""Which prompts a head has seen, so that none of them is taken for an unseen one later."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PROMPTS_NAME = "prompts.safetensors"
# What it is called until the head's configuration names it: a stop between two renames leaves either record whole.
NEXT_PROMPTS_NAME = "prompts.next.safetensors"


def _none() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class SeenPrompts:
    """
    The prompts that a head has seen, each by its hash (`data.fingerprints.prompt_hash`): 8 bytes a prompt, and no
    text of anybody's.

    Args:
        trained_on, validated_on, tuned_on (`torch.Tensor` of shape `(prompts,)`, *optional*):
            Those that its weights were fitted to; those that chose its epoch and its held-out figures are of; those
            that its recommended control was chosen on. They are kept as int64, sorted, each once.
    """

    trained_on: torch.Tensor = field(default_factory=_none)
    validated_on: torch.Tensor = field(default_factory=_none)
    tuned_on: torch.Tensor = field(default_factory=_none)

    def __post_init__(self):
        for name in self.kinds():
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.int64).unique())

    @classmethod
    def kinds(cls) -> list[str]:
        """The names of the three."""
        return [item.name for item in fields(cls)]

    def counts(self) -> dict[str, int]:
        """How many prompts each of the three holds."""
        return {name: len(getattr(self, name)) for name in self.kinds()}

    def digest(self) -> str:
        """A hash of all numbers, which the head's configuration names."""
        found = hashlib.sha256()
        for name in self.kinds():
            numbers = getattr(self, name)
            found.update(f"{name} {len(numbers)} ".encode() + numbers.numpy().astype("<i8").tobytes())
        return found.hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write them as a safetensors file."""
        save_file({name: getattr(self, name) for name in self.kinds()}, path)

    @classmethod
    def load(cls, path: Path, digest: str) -> SeenPrompts:
        """
        Read the file of the head whose configuration names `digest`.

        Raises:
            `ValueError`: if it is no such file, or that of another head; names the file.
        """
        tensors = {}
        try:
            with safe_open(path, framework="pt") as file:
                if sorted(file.keys()) != sorted(cls.kinds()):
                    raise ValueError(f"{path} must hold the tensors {', '.join(cls.kinds())}.")
                for name in cls.kinds():
                    part = file.get_slice(name)
                    if part.get_dtype() != "I64" or len(part.get_shape()) != 1:
                        raise ValueError(f"{path}: `{name}` must be a list of integers of 64 bits.")
                    tensors[name] = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}).") from error
        found = cls(**tensors)
        if found.digest() != digest:
            raise ValueError(
                f"{path} does not hold the prompts that this head was made with: it is cut off, or another head's. "
                "Take it from where the head's other files are from."
            )
        return found
