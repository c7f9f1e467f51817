"""States of many episodes: in memory, or in memory-mapped safetensors files that are written piece by piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..utils.checks import check_shapes
from .stage_folder import MANIFEST_NAME, checked_parts, read_manifest

# Names of dtypes in a safetensors header.
_HEADER_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HEADER_NAMES |= {torch.int64: "I64", torch.int8: "I8", torch.bool: "BOOL"}
# The tensors of [`States`] that are stored in the dtype asked for.
WIDE = ("hidden", "directions", "context")
# The scales of int8 features are set by the first states of a file, so many.
_STATES_FOR_SCALES = 2048
# What the dimensions of the tensors of [`States`] are.
_STATES = "states (the sum of `lengths`)"
_SHAPES = dict.fromkeys(("hidden", "directions"), (_STATES, "hidden_size"))
_SHAPES |= {"context": (_STATES, "context_size"), "tokens": (_STATES,), "prefix_rewards": (_STATES, "objectives")}
_SHAPES |= dict.fromkeys(("lengths", "prompts", "finished"), ("episodes",)) | {"rewards": ("episodes", "objectives")}
# Fewer rewards of the response so far than this make no mean of their own.
_ENOUGH = 30
# Features that are smaller there than this share of the average one are not given a finer grid.
_SMALLEST_FEATURE = 1e-2


@dataclass
class States:
    """
    The states of many episodes, one after the other. State t of an episode is the one its token t was drawn from.

    Args:
        hidden (`torch.Tensor` of shape `(states, hidden_size)`):
            The states. As int8 they stand for `hidden * hidden_row_scale * hidden_feature_scale`.
        lengths (`torch.Tensor` of shape `(episodes,)`):
            How many states each episode has: one for each token, or for every `every`-th.
        rewards (`torch.Tensor` of shape `(episodes, num_objectives)`):
            The reward of each response.
        prompts (`torch.Tensor` of shape `(episodes,)`):
            A number for each prompt, so that no prompt is in two splits.
        finished (`torch.Tensor` of shape `(episodes,)`, *optional*):
            Whether the model ended its turn. Defaults to all.
        directions (`torch.Tensor` of shape `(states, hidden_size)`, *optional*):
            `w_y - w̄(h)`: the LM head's row of the drawn token less its mean under the policy. Needed by the advantage
            part.
        context (`torch.Tensor` of shape `(states, context_size)`, *optional*):
            The states of another layer at the same tokens, for a critic.
        tokens (`torch.Tensor` of shape `(states,)`, *optional*):
            The drawn tokens y. Needed by the token bias.
        prefix_rewards (`torch.Tensor` of shape `(states, num_objectives)`, *optional*):
            The rewards of the response so far, as far as they are known: those of the latest part of it that was
            scored. NaN where none was.
        hook_point (`str`), layer (`int`), base_model_name_or_path, base_model_revision (`str`, *optional*):
            Where the states were read.
        every (`int`, *optional*, defaults to 1):
            One state in how many is kept, counted back from the last one, which always is.
        context_layer (`int`, *optional*):
            Where the context was read.
        vocabulary_size (`int`, *optional*):
            How many rows the LM head has.
        hidden_row_scale, hidden_feature_scale, directions_row_scale, directions_feature_scale, context_row_scale,
        context_feature_scale (*optional*):
            Scales of int8 states, of shapes `(states, 1)` and `(hidden_size,)`.
        int8_error (`torch.Tensor` of shape `(tensors,)`, *optional*):
            Root mean square error of `hidden`, `directions`, `context` as int8, relative to each feature's spread.

    Raises:
        `ValueError`: if a tensor has another shape, or no integers where they belong; names it.
    """

    hidden: torch.Tensor
    lengths: torch.Tensor
    rewards: torch.Tensor
    prompts: torch.Tensor
    finished: torch.Tensor | None = None
    directions: torch.Tensor | None = None
    context: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    prefix_rewards: torch.Tensor | None = None
    hook_point: str = "lm_head"
    layer: int = -1
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    every: int = 1
    context_layer: int | None = None
    vocabulary_size: int | None = None
    hidden_row_scale: torch.Tensor | None = None
    hidden_feature_scale: torch.Tensor | None = None
    directions_row_scale: torch.Tensor | None = None
    directions_feature_scale: torch.Tensor | None = None
    context_row_scale: torch.Tensor | None = None
    context_feature_scale: torch.Tensor | None = None
    int8_error: torch.Tensor | None = None

    def __post_init__(self):
        check_shapes({"hidden": self.hidden, "lengths": self.lengths}, _SHAPES, {})
        if self.finished is None:
            self.finished = torch.ones(len(self.lengths), dtype=torch.bool)
        given = {name: value for name in _SHAPES if (value := getattr(self, name)) is not None}
        sizes = {"episodes": len(self.lengths), _STATES: int(self.lengths.sum()), "hidden_size": self.hidden.shape[1]}
        check_shapes(given, _SHAPES, sizes, integers=("lengths", "prompts", "tokens"))

    def rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of `"hidden"`, `"directions"` or `"context"` in float32, or of `"tokens"`; only these are read."""
        values = getattr(self, name)[rows]
        if name == "tokens":
            return values
        values, row_scale = values.float(), getattr(self, f"{name}_row_scale")
        if row_scale is None:
            return values
        return values * row_scale[rows] * getattr(self, f"{name}_feature_scale")

    @classmethod
    def open(cls, path: str | os.PathLike) -> States:
        """
        Memory-map a file of a [`StateStore`].

        Raises:
            `OSError`, `ValueError`: names the file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads(file.metadata()["hf_recontrol"])
                # Views of the mapped file: nothing is read yet.
                return cls(**{name: file.get_tensor(name) for name in file.keys()}, **metadata)  # noqa: SIM118
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} does not hold states ({error}): make them with `recontrol states`.") from error


def places(lengths: torch.Tensor) -> torch.Tensor:
    """Of episodes of these lengths, one after the other: the place of each state in its episode, `(states,)`."""
    return torch.arange(int(lengths.sum())) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)


class StateStore:
    """
    The states of all files of one folder or several, as one sequence of episodes.

    Args:
        parts (sequence of [`States`]):
            What it is made of; all read at the same hook point.
        folders (sequence of `Path`, *optional*):
            Where the parts are from, so that other processes can open them again.
    """

    def __init__(self, parts: Sequence[States], folders: Sequence[Path] = ()):
        self.parts, self.folders = list(parts), tuple(folders)
        self.lengths = torch.cat([part.lengths for part in parts])
        self.rewards = torch.cat([part.rewards for part in parts])
        self.prompts = torch.cat([part.prompts for part in parts])
        self.finished = torch.cat([part.finished for part in parts])
        self._part = torch.cat([torch.full((len(part.lengths),), i) for i, part in enumerate(parts)])
        self._start = torch.cat([part.lengths.cumsum(0) - part.lengths for part in parts])

    @classmethod
    def open(cls, *folders: str | os.PathLike) -> StateStore:
        """
        Memory-map the finished folder of `recontrol states`, or several that go together (see [`train_head`]).

        Raises:
            `OSError`, `ValueError`: if one holds no finished states, or a file is missing or cut off; names it.
        """
        manifests = {Path(folder): read_manifest(folder, "states", "recontrol states") for folder in folders}
        paths = [folder / name for folder, manifest in manifests.items() for name in sorted(manifest["parts"])]
        for path in paths:
            if not path.is_file():
                lacks = f"{path.parent} lacks {path.name}, which its {MANIFEST_NAME} names"
                raise OSError(f"{lacks}: run `recontrol states` again.")
        return cls([States.open(path) for path in paths], list(manifests))

    @classmethod
    def of(cls, states: States | StateStore | str | os.PathLike) -> StateStore:
        """A store of what is given: a store, states in memory, or a folder, whose files are held against checksums."""
        if isinstance(states, (str, os.PathLike)):
            checked_parts(states, "states", "recontrol states")
            return cls.open(states)
        return states if isinstance(states, StateStore) else cls([states])

    def __reduce__(self):
        # To another process go the folders' names, not the mapped files.
        return (StateStore.open, self.folders) if self.folders else (StateStore, (self.parts,))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_states(self) -> int:
        return int(self.lengths.sum())

    @property
    def hidden_size(self) -> int:
        return self.parts[0].hidden.shape[1]

    @property
    def has_directions(self) -> bool:
        return all(part.directions is not None for part in self.parts)

    @property
    def has_context(self) -> bool:
        return all(part.context is not None for part in self.parts)

    @property
    def has_prefix_rewards(self) -> bool:
        return all(part.prefix_rewards is not None for part in self.parts)

    @property
    def vocabulary_size(self) -> int | None:
        return self.parts[0].vocabulary_size

    @property
    def has_tokens(self) -> bool:
        return all(part.tokens is not None for part in self.parts) and self.vocabulary_size is not None

    @cached_property
    def _prefix_rewards(self) -> torch.Tensor:
        rewards = torch.cat([part.prefix_rewards for part in self.parts]).double()
        known = rewards.isfinite()
        place = places(self.lengths)
        sums, counts = (
            torch.zeros(int(self.lengths.max()), rewards.shape[1], dtype=torch.float64).index_add_(0, place, values)
            for values in (rewards.where(known, 0.0), known.double())
        )
        means, enough = sums / counts.clamp(min=1), counts >= _ENOUGH
        # Where few are known, the mean is that of the last place at which enough were.
        last = torch.arange(len(means))[:, None].where(enough, -1).cummax(0).values
        overall = sums.sum(0) / counts.sum(0).clamp(min=1)
        means = means.gather(0, last.clamp(min=0)).where(last >= 0, overall)
        return (rewards - means[place]).where(known, 0.0).float()

    def prefix_rewards(self, episodes: torch.Tensor) -> torch.Tensor:
        """
        The rewards of the response so far at the states of whole episodes, less their mean over all episodes at the
        same place (a reward may grow with every token, and that is nobody's merit), and 0 where none is known:
        `(states, num_objectives)`, in float32; `(states, 0)` if none are kept.
        """
        lengths = self.lengths[episodes]
        if not self.has_prefix_rewards:
            return torch.empty(int(lengths.sum()), 0)
        first = (self.lengths.cumsum(0) - self.lengths)[episodes]
        return self._prefix_rewards[torch.repeat_interleave(first, lengths) + places(lengths)]

    @cached_property
    def read_at(self) -> dict:
        """Where in the model the states were read, and how densely."""
        names = ("hook_point", "layer", "base_model_name_or_path", "base_model_revision", "every")
        return {name: getattr(self.parts[0], name) for name in names}

    def gather(self, name: str, episodes: torch.Tensor) -> torch.Tensor:
        """
        `"hidden"`, `"directions"` or `"context"` of whole episodes, one after the other, in float32, `(states,
        hidden_size)`; or their `"tokens"`, `(states,)`.
        """
        lengths = self.lengths[episodes]
        rows = torch.repeat_interleave(self._start[episodes], lengths) + places(lengths)
        parts = self._part[episodes]
        if len(self.parts) == 1 or bool((parts == parts[0]).all()):
            return self.parts[int(parts[0])].rows(name, rows)
        owner = torch.repeat_interleave(parts, lengths)
        none = self.parts[0].rows(name, rows[:0])
        values = none.new_empty(len(rows), *none.shape[1:])
        for part in parts.unique().tolist():
            chosen = (owner == part).nonzero()[:, 0]
            values[chosen] = self.parts[part].rows(name, rows[chosen])
        return values


class StateWriter:
    """
    A safetensors file of [`States`] that is written piece by piece, in any order of the episodes, so that no more is
    in memory than a piece. Every tensor's size is known before: the file starts with its complete header.

    Args:
        path (`Path`):
            The file.
        small (`dict[str, torch.Tensor]`):
            The tensors that are known before: those with one row for each episode, of which `lengths` says how many
            states each has, and `tokens` and `prefix_rewards`.
        widths (`dict[str, int]`):
            Of `"hidden"` and, if they are kept, `"directions"` and `"context"`.
        dtype (`torch.dtype`):
            Of the states; int8 is scaled by row and feature.
        metadata (`dict`):
            The other fields of [`States`].
    """

    def __init__(
        self, path: Path, small: dict[str, torch.Tensor], widths: dict[str, int], dtype: torch.dtype, metadata: dict
    ):
        self.dtype = dtype
        ends = small["lengths"].cumsum(0)
        self._first_rows = (ends - small["lengths"]).tolist()
        num_states = int(ends[-1]) if len(ends) else 0
        if dtype == torch.int8:
            small = small | {"int8_error": torch.zeros(len(widths))}
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in small.items()}
        for name, width in widths.items():
            shapes[name] = (dtype, (num_states, width))
            if dtype == torch.int8:
                shapes[f"{name}_row_scale"] = (torch.float32, (num_states, 1))
                shapes[f"{name}_feature_scale"] = (torch.float32, (width,))
        header: dict = {"__metadata__": {"hf_recontrol": json.dumps(metadata)}}
        self._offsets, end = {}, 0
        # Wide dtypes first, so that every tensor is aligned.
        for name, (kind, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
            size = kind.itemsize * math.prod(shape)
            header[name] = {"dtype": _HEADER_NAMES[kind], "shape": shape, "data_offsets": [end, end + size]}
            self._offsets[name], end = end, end + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._feature_scales: dict[str, torch.Tensor] = {}
        self._held: dict[str, list[tuple[int, torch.Tensor]]] = {name: [] for name in widths}
        # For each feature: squared error of int8, sum, sum of squares; in float64.
        self._moments = {n: torch.zeros(3, widths[n], dtype=torch.float64) for n in WIDE if n in widths}
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)
        for name, tensor in small.items():
            self._write(name, 0, tensor)
        self._num_states = num_states

    def __enter__(self) -> StateWriter:
        return self

    def __exit__(self, error_type, *error) -> None:
        try:
            if self.dtype == torch.int8 and error_type is None:
                for name in self._held:
                    self._write_held(name)
                self._write("int8_error", 0, torch.tensor([*map(self._int8_error, self._moments.values())]))
        finally:
            self._file.close()

    def _write(self, name: str, row: int, tensor: torch.Tensor) -> None:
        row_size = tensor[:1].numel() * tensor.element_size()
        self._file.seek(self._start + self._offsets[name] + row * row_size)
        self._file.write(tensor.contiguous().view(torch.uint8).numpy() if tensor.numel() else b"")

    def write(self, name: str, episode: int, values: torch.Tensor) -> None:
        """
        Write `"hidden"`, `"directions"` or `"context"` of an episode, by its number in the file.

        Raises:
            `ValueError`: if they leave the range of the dtype.
        """
        first_row = self._first_rows[episode]
        if self.dtype != torch.int8:
            stored = values.to("cpu", self.dtype)
            if not torch.isfinite(stored).all():
                raise ValueError(
                    f"The {name} hold values that are not finite in {str(self.dtype).removeprefix('torch.')}: store "
                    "them in another dtype (bfloat16 has the range of float32)."
                )
            self._write(name, first_row, stored)
            return
        values = values.float().cpu()
        if not torch.isfinite(values).all():
            raise ValueError(f"The {name} hold NaN or infinite values.")
        if name in self._feature_scales:
            self._write_int8(name, first_row, values)
            return
        self._held[name].append((first_row, values))
        if sum(len(held) for _, held in self._held[name]) >= _STATES_FOR_SCALES:
            self._write_held(name)

    def _write_held(self, name: str) -> None:
        """Set the scales of the features by the states held back so far, and write these."""
        held, self._held[name] = self._held[name], []
        if not held:
            return
        size = torch.stack([values.abs().amax(0) for _, values in held if len(values)]).amax(0)
        self._feature_scales[name] = size.clamp(min=float(size.mean()) * _SMALLEST_FEATURE + 1e-30)
        self._write(f"{name}_feature_scale", 0, self._feature_scales[name])
        for first_row, values in held:
            self._write_int8(name, first_row, values)

    def _write_int8(self, name: str, first_row: int, values: torch.Tensor) -> None:
        scaled = values / self._feature_scales[name]
        row_scale = scaled.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        stored = (scaled / row_scale).round().to(torch.int8)
        self._write(f"{name}_row_scale", first_row, row_scale)
        self._write(name, first_row, stored)
        error = stored.float() * row_scale * self._feature_scales[name] - values
        self._moments[name] += torch.stack([x.double().sum(0) for x in (error.square(), values, values.square())])

    def _int8_error(self, moments: torch.Tensor) -> float:
        squared_error, mean, square = moments / max(1, self._num_states)
        variance = square - mean.square()
        varies = variance > 1e-12 * square
        return float((squared_error / variance)[varies].mean().sqrt()) if varies.any() else 0.0
