"""States that are kept while responses are sampled, so that they need no forward of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import LogitsProcessor, PreTrainedModel

from ..data.fingerprints import stable_number
from ..data.rollouts import Rollout
from ..modeling.causal_lm import ReControlForCausalLM
from ..modeling.hook_points import HookPoint, find_lm_head, read_states
from ..utils.files import atomic_path
from .directions import directions, mean_rows

KEPT_FOLDER = "kept_states"
# In memory.
_MOST_BYTES = 1 << 30
_METADATA_KEY = "hf_recontrol"


def are_same(logits: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether two ways to some logits gave the same ones: a cap or a scale is more than what their dtype rounds."""
    rounding = max(1e-3, 4 * torch.finfo(logits.dtype).eps)
    return torch.allclose(logits.float(), others.float(), rtol=rounding, atol=rounding)


class StateKeeper(LogitsProcessor):
    """
    Keeps what each token of a batch is drawn from, while it is drawn. It must be the first processor, for the others
    change the scores.

    Args:
        hook_point ([`HookPoint`]):
            Where the states are read.
        weight (`torch.Tensor` of shape `(vocabulary, hidden_size)`, *optional*):
            The LM head's rows, if the directions are kept too.
        temperature (`float`):
            What the batch is sampled at.
        logits_of (function, *optional*):
            What the LM head makes of states, where these are its input: the scores are compared with it.

    Attributes:
        is_all_of_logits (`bool`):
            Whether the scores were found to be that, and nothing else.
    """

    def __init__(
        self,
        hook_point: HookPoint,
        weight: torch.Tensor | None,
        temperature: float,
        logits_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self._hook_point, self._weight, self._temperature = hook_point, weight, temperature
        self._logits_of, self._is_lost = logits_of, False
        self.is_all_of_logits = False
        self._seen: list[torch.Tensor] = []
        self._hidden: list[torch.Tensor] = []
        self._means: list[torch.Tensor] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read the states of the forwards in the block."""
        with read_states(self._hook_point, keep_logits=True) as self._seen:
            yield

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._logits_of is not None and not self._seen:
            # Code that was compiled before looks for no new hook, and some models call no module.
            self._is_lost, self.is_all_of_logits = True, False
        if self._is_lost:
            return scores
        # A copy: of a prompt's forward only the last position is to stay in memory.
        state = self._seen[-1][:, -1:].clone()
        if self._logits_of is not None and not self._hidden:
            self.is_all_of_logits = are_same(self._logits_of(state)[:, -1], scores)
        self._hidden.append(state[:, 0])
        self._seen.clear()
        if self._weight is not None:
            self._means.append(mean_rows(scores, self._temperature, self._weight))
        return scores

    def hidden(self) -> torch.Tensor:
        """The states, `(rows, tokens, hidden_size)`, in the dtype that they were computed in."""
        return torch.stack(self._hidden, 1)

    @torch.no_grad()
    def save(self, path: Path, rollouts: Sequence[Rollout], settings: dict) -> None:
        """Write the states of the batch's `rollouts`, in the dtype they were computed in."""
        tensors: dict[str, list[torch.Tensor]] = {"hidden": [], "directions": []}
        hidden = self.hidden()
        means = torch.stack(self._means, 1) if self._weight is not None else None
        for row, rollout in enumerate(rollouts):
            length = len(rollout.completion_ids)
            tensors["hidden"].append(hidden[row, :length])
            if means is not None:
                drawn = directions(rollout.completion_ids, means[row, :length], self._weight)
                tensors["directions"].append(drawn.to(hidden.dtype))
        stored = {name: torch.cat(values).cpu() for name, values in tensors.items() if values}
        stored["lengths"] = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
        stored["tokens"] = torch.tensor([_token_number(rollout) for rollout in rollouts])
        with atomic_path(path) as temporary:
            # Not `save_file`, whose errors do not say that a disk is full in the way of all others.
            temporary.write_bytes(save(stored, {_METADATA_KEY: json.dumps(settings)}))


@dataclass
class KeptInFiles:
    """Which states of a run are kept in files: read where, and in which file, by the batch's number."""

    hook_point: HookPoint
    weight: torch.Tensor | None
    settings: dict
    path: Callable[[int], Path]

    def keeper(self, temperature: float) -> StateKeeper:
        """For the states of one batch."""
        return StateKeeper(self.hook_point, self.weight, temperature)

    def take(self, number: int, keeper: StateKeeper, rollouts: Sequence[Rollout]) -> None:
        """Keep the states of a batch's rollouts."""
        keeper.save(self.path(number), rollouts, self.settings)


class KeptInMemory:
    """
    The states at the LM head's input that responses were drawn from, for who reads these next. Those of logits that
    are not the LM head's alone (caps, scales) are not kept, and no more than a GiB.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            What draws.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._hook_point = HookPoint(find_lm_head(model), None, model.config.get_text_config().hidden_size, True)
        self._found: dict[int, torch.Tensor] = {}
        self._num_bytes = 0

    def keeper(self, temperature: float) -> StateKeeper:
        """For the states of one batch."""
        return StateKeeper(self._hook_point, None, temperature, self._logits_of)

    def _logits_of(self, states: torch.Tensor) -> torch.Tensor:
        # A block of its own, since what a generation makes of the LM head beside its forwards is the base's.
        with self._model.use_control(None) if isinstance(self._model, ReControlForCausalLM) else nullcontext():
            return self._hook_point.module(states)

    def take(self, number: int, keeper: StateKeeper, rollouts: Sequence[Rollout]) -> None:
        """Keep the states of a batch's rollouts."""
        if not keeper.is_all_of_logits:
            return
        for rollout, states in zip(rollouts, keeper.hidden().cpu(), strict=True):
            # A copy: a response may be much shorter than its batch.
            own = states[: len(rollout.completion_ids)].clone()
            if self._num_bytes + own.nbytes <= _MOST_BYTES:
                self._num_bytes += own.nbytes
                self._found[_token_number(rollout)] = own

    def find(self, rollout: Rollout) -> torch.Tensor | None:
        """`(tokens, hidden_size)`, or `None`."""
        return self._found.get(_token_number(rollout))


def _token_number(rollout: Rollout) -> int:
    return stable_number([rollout.prompt_ids, rollout.completion_ids])


def kept_settings(hook_point: HookPoint, settings: dict) -> dict:
    """What kept states depend on: where, and all that the rollouts depend on (the `settings` of their stage)."""
    return {"layer": hook_point.layer, "rollouts": stable_number(settings)}


def kept_path(folder: str | os.PathLike, part: int, batch: int) -> Path:
    """The file of a batch's states, in a folder of rollouts."""
    return Path(folder) / KEPT_FOLDER / f"part-{part:05d}-{batch:05d}.safetensors"


def _files(folder: str | os.PathLike, part: int | None = None) -> list[Path]:
    number = "*" if part is None else f"{part:05d}"
    return sorted((Path(folder) / KEPT_FOLDER).glob(f"part-{number}-*.safetensors"))


def remove_kept(folder: str | os.PathLike, part: int | None = None) -> None:
    """Remove the files of kept states of one part, or of all parts, from a folder of rollouts."""
    for path in _files(folder, part):
        path.unlink()
    # Other processes may be about to write theirs into it.
    if part is None:
        with suppress(OSError):  # something else lies in it
            (Path(folder) / KEPT_FOLDER).rmdir()


def _fits(file: Any, settings: dict | None, names: Sequence[str]) -> bool:
    return settings is None or (
        json.loads(file.metadata()[_METADATA_KEY]) == settings and set(names) <= set(file.keys())
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold kept states ({error}): remove it, then they are read again."
        ) from error


def has_kept(folder: str | os.PathLike, settings: dict | None = None, names: Sequence[str] = ()) -> bool:
    """
    Whether a folder of rollouts holds kept states, of these settings and names if they are given.

    Raises:
        `ValueError`: if a file is damaged; names it.
    """
    found = False
    for path in _files(folder):
        with _opened(path) as file:
            found = found or _fits(file, settings, names)
    return found


class KeptStates:
    """
    The states that were kept for one part of a folder of rollouts, memory-mapped.

    Args:
        folder (`str` or `os.PathLike`), part (`int`):
            The folder of rollouts, and the number of its part.
        settings (`dict`), names (sequence of `str`), width (`int`):
            The [`kept_settings`] that files must be of (others are passed by), what is needed of them: `"hidden"`,
            `"directions"`, and how wide states are.

    Raises:
        `ValueError`: if a file is damaged; names it.
    """

    def __init__(self, folder: str | os.PathLike, part: int, settings: dict, names: Sequence[str], width: int):
        self._found: dict[int, dict[str, torch.Tensor]] = {}
        for path in _files(folder, part):
            with _opened(path) as file:
                if not _fits(file, settings, names):
                    continue
                lengths, tokens = file.get_tensor("lengths").tolist(), file.get_tensor("tokens").tolist()
                tensors = [file.get_tensor(name) for name in names]
                if len(tokens) != len(lengths) or any(tensor.shape != (sum(lengths), width) for tensor in tensors):
                    raise ValueError("its tensors do not fit together")
                rows = zip(*(tensor.split(lengths) for tensor in tensors), strict=True)
                self._found |= {
                    token: dict(zip(names, row, strict=True)) for token, row in zip(tokens, rows, strict=True)
                }

    def find(self, rollout: Rollout) -> dict[str, torch.Tensor] | None:
        """What was kept of a rollout, by name, or `None`."""
        values = self._found.get(_token_number(rollout))
        return values if values and len(values["hidden"]) == len(rollout.completion_ids) else None
