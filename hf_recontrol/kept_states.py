"""States that are kept while responses are sampled, so that they need no forward of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import LogitsProcessor, PreTrainedModel

from .configuration import ValueHeadConfig
from .files import atomic_path
from .hooks import read_states
from .places import hook_width, lm_head_rows
from .records import Rollout, stable_number

KEPT_FOLDER = "kept_states"


def mean_rows(logits: torch.Tensor, temperature: float, weight: torch.Tensor) -> torch.Tensor:
    """
    The mean row w̄ = Σ_y π(y) w_y of the LM head under the policy.

    Args:
        logits (`torch.Tensor` of shape `(states, vocabulary)`):
            The model's own; π is their softmax at the temperature.
        temperature (`float`):
            0, as for greedy responses, is taken as 1.
        weight (`torch.Tensor` of shape `(vocabulary, hidden_size)`):
            The LM head's rows w_y.

    Returns:
        `torch.Tensor` of shape `(states, hidden_size)`, in float32.
    """
    logits = logits.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    return (torch.softmax(logits, dim=-1).to(weight.device, weight.dtype) @ weight).float()


class StateKeeper(LogitsProcessor):
    """
    Keeps what each token of a batch is drawn from, while it is drawn. It must be the first processor, for the others
    change the scores.

    Args:
        model ([`~transformers.PreTrainedModel`]), config ([`ValueHeadConfig`]):
            The model that generates, and where its states are read; with `advantage_sizes` also the directions.
        temperature (`float`):
            What the batch is sampled at.

    Raises:
        `ValueError`: if the model has no such place, or the LM head's rows cannot be read.
    """

    def __init__(self, model: PreTrainedModel, config: ValueHeadConfig, temperature: float):
        self._weight = lm_head_rows(model) if config.advantage_sizes is not None else None
        hook_width(model, config)
        self._model, self._config, self._temperature = model, config, temperature
        self._seen: list[torch.Tensor] = []
        self._hidden: list[torch.Tensor] = []
        self._means: list[torch.Tensor] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read the states of the forwards in the block."""
        with read_states(self._model, self._config, keep_logits=True) as self._seen:
            yield

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # A copy: of a prompt's forward only the last position is to stay in memory.
        self._hidden.append(self._seen[-1][:, -1].clone())
        self._seen.clear()
        if self._weight is not None:
            self._means.append(mean_rows(scores, self._temperature, self._weight))
        return scores

    @torch.no_grad()
    def save(self, path: Path, rollouts: Sequence[Rollout], place: dict) -> None:
        """Write the states of the batch's `rollouts`, in the dtype they were computed in."""
        tensors: dict[str, list[torch.Tensor]] = {"hidden": [], "directions": []}
        hidden = torch.stack(self._hidden, 1)
        means = torch.stack(self._means, 1) if self._weight is not None else None
        for row, rollout in enumerate(rollouts):
            length = len(rollout.completion_ids)
            tensors["hidden"].append(hidden[row, :length])
            if means is not None:
                drawn = self._weight[torch.tensor(rollout.completion_ids, device=means.device, dtype=torch.long)]
                tensors["directions"].append((drawn.float() - means[row, :length]).to(hidden.dtype))
        stored = {name: torch.cat(values).cpu() for name, values in tensors.items() if values}
        stored["lengths"] = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
        stored["tokens"] = torch.tensor([_token_number(rollout) for rollout in rollouts])
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(stored, temporary, {"hf_recontrol": json.dumps(place)})


def _token_number(rollout: Rollout) -> int:
    return stable_number([rollout.prompt_ids, rollout.completion_ids])


def kept_path(folder: str | os.PathLike, part: int, batch: int) -> Path:
    """The file of a batch's states, in a folder of rollouts."""
    return Path(folder) / KEPT_FOLDER / f"part-{part:05d}-{batch:05d}.safetensors"


class KeptStates:
    """
    The states that were kept for one part of a folder of rollouts, memory-mapped.

    Args:
        folder (`str` or `os.PathLike`), part (`int`):
            The folder of rollouts, and the number of its part.
        place (`dict`), names (sequence of `str`):
            Where the states must have been read, and what is needed: `"hidden"`, `"directions"`. Files that were kept
            at another place are passed by.

    Raises:
        `ValueError`: if a file is damaged; names it.
    """

    def __init__(self, folder: str | os.PathLike, part: int, place: dict, names: Sequence[str]):
        self._found: dict[int, tuple[list[torch.Tensor], slice]] = {}
        for path in sorted((Path(folder) / KEPT_FOLDER).glob(f"part-{part:05d}-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    if json.loads(file.metadata()["hf_recontrol"]) != place or not set(names) <= set(file.keys()):
                        continue
                    tensors = [file.get_tensor(name) for name in names]
                    lengths, tokens = file.get_tensor("lengths"), file.get_tensor("tokens").tolist()
                ends = lengths.cumsum(0).tolist()
                if len(tokens) != len(ends) or any(len(tensor) != (ends or [0])[-1] for tensor in tensors):
                    raise ValueError("its tensors do not fit together")
            except (SafetensorError, TypeError, KeyError, ValueError) as error:
                raise ValueError(
                    f"{path} does not hold kept states ({error}): remove it, then they are read again."
                ) from error
            starts = (lengths.cumsum(0) - lengths).tolist()
            self._found |= {token: (tensors, slice(*span)) for token, *span in zip(tokens, starts, ends, strict=True)}

    def __len__(self) -> int:
        return len(self._found)

    def find(self, rollout: Rollout) -> list[torch.Tensor] | None:
        """What was kept of a rollout, a tensor for each name, or `None`."""
        tensors, part = self._found.get(_token_number(rollout), (None, None))
        return None if tensors is None else [tensor[part] for tensor in tensors]
