"""Rollouts to hidden states: what a head is trained on, read by teacher forcing at its hook point."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration import ValueHeadConfig
from .files import atomic_path
from .hooks import find_lm_head, read_states
from .hub import portable_name
from .modeling import ReControlForCausalLM
from .rollouts import Rollout, pad_batch


@dataclass
class States:
    """
    The states of many episodes, one after the other. State t of an episode is the one its token t was drawn from.

    Args:
        hidden (`torch.Tensor` of shape `(states, hidden_size)`):
            The states.
        lengths (`torch.Tensor` of shape `(episodes,)`):
            How many states, that is tokens, each episode has.
        rewards (`torch.Tensor` of shape `(episodes, num_objectives)`):
            The reward of each response.
        prompts (`torch.Tensor` of shape `(episodes,)`):
            The number of the episode's prompt, so that no prompt is in two splits.
        directions (`torch.Tensor` of shape `(states, hidden_size)`, *optional*):
            `w_y - w̄(h)`: the LM head's row of the drawn token less its mean under the base. Needed by the advantage
            part.
        hook_point (`str`), layer (`int`), base_model_name_or_path (`str`, *optional*):
            Where the states were read.
    """

    hidden: torch.Tensor
    lengths: torch.Tensor
    rewards: torch.Tensor
    prompts: torch.Tensor
    directions: torch.Tensor | None = None
    hook_point: str = "lm_head"
    layer: int = -1
    base_model_name_or_path: str | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, torch.Tensor)}
        metadata = {name: str(value) for name, value in values.items() if name not in tensors}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> States:
        """Read what [`States.save`] wrote.

        Raises:
            `OSError`, `ValueError`: names the file.
        """
        if not Path(path).is_file():
            raise OSError(f"{path} is no file: make one with `recontrol states`.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
            return cls(**load_file(path), **metadata | {"layer": int(metadata["layer"])})
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} does not hold states ({error}): make it with `recontrol states`.") from error


@torch.no_grad()
def collect_states(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    config: ValueHeadConfig,
    *,
    batch_size: int = 16,
) -> States:
    """
    Read the states of scored rollouts in one teacher-forced forward a batch. Under control of the last layer the
    states of a token sequence do not depend on the control, so they are those of generation.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base model; a controlled one is read with its control off.
        rollouts (sequence of [`Rollout`]):
            Scored rollouts.
        config ([`ValueHeadConfig`]):
            Where to read: its `hook_point` and `layer`. With `advantage_sizes`, the directions are collected too.
        batch_size (`int`, *optional*, defaults to 16):
            Rollouts read at once.

    The mean row w̄ is taken at the rollout's sampling temperature (at 1 for greedy ones).

    Raises:
        `ValueError`: if a rollout has no reward, there is none with a token, or the LM head's weight cannot be read.
    """
    if any(rollout.reward is None for rollout in rollouts):
        raise ValueError("A rollout has no reward: score them first (`recontrol label`).")
    numbers: dict[str, int] = {}
    prompts = [numbers.setdefault(repr(rollout.prompt), len(numbers)) for rollout in rollouts]
    used = [i for i, rollout in enumerate(rollouts) if rollout.completion_ids]
    if not used:
        raise ValueError("No rollout has a token: nothing to learn from.")
    vocabulary = model.get_input_embeddings().num_embeddings
    if max(max(rollouts[i].prompt_ids + rollouts[i].completion_ids) for i in used) >= vocabulary:
        raise ValueError(
            f"The rollouts hold token ids that are not in the model's vocabulary of {vocabulary}: they were sampled "
            "from another model."
        )
    with_directions = config.advantage_sizes is not None
    weight = find_lm_head(model).weight if with_directions else None
    if with_directions and not weight.is_floating_point():
        raise ValueError(
            f"The LM head's weight is {weight.dtype}, so its rows cannot be read for the advantage part: load the "
            "base with its LM head unquantised, or leave `advantage_sizes` out."
        )
    hidden: dict[int, torch.Tensor] = {}
    directions: dict[int, torch.Tensor] = {}
    no_control = model.disable_control() if isinstance(model, ReControlForCausalLM) else contextlib.nullcontext()
    order = sorted(used, key=lambda i: -len(rollouts[i].prompt_ids) - len(rollouts[i].completion_ids))
    with no_control, logging.tqdm(total=len(order), desc="states") as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = [rollouts[i].prompt_ids + rollouts[i].completion_ids for i in batch]
            # Padding on the right: under causal attention it changes nothing before it, not even positions.
            inputs = pad_batch(rows, 0, "right", model.device)
            first = 0
            options = {}
            if with_directions and model._supports_logits_to_keep():
                first = min(len(rollouts[i].prompt_ids) for i in batch) - 1
                options["logits_to_keep"] = inputs["input_ids"].shape[1] - first
            elif not with_directions and config.hook_point != "lm_head" and model._supports_logits_to_keep():
                options["logits_to_keep"] = 1
            with read_states(model, config, keep_logits=with_directions) as states:
                logits = model(**inputs, **options, use_cache=False).logits
            for row, i in enumerate(batch):
                begin = len(rollouts[i].prompt_ids) - 1 - first
                part = slice(begin, begin + len(rollouts[i].completion_ids))
                hidden[i] = states[0][row, part].float().cpu()
                if with_directions:
                    policy = torch.softmax(logits[row, part].float() / (rollouts[i].temperature or 1.0), dim=-1)
                    tokens = torch.tensor(rollouts[i].completion_ids, device=weight.device)
                    mean = policy.to(weight.device, weight.dtype) @ weight
                    directions[i] = (weight[tokens].float() - mean.float()).cpu()
            progress.update(len(batch))
    return States(
        hidden=torch.cat([hidden[i] for i in used]),
        lengths=torch.tensor([len(hidden[i]) for i in used]),
        rewards=torch.tensor([rollouts[i].reward for i in used], dtype=torch.float32),
        prompts=torch.tensor([prompts[i] for i in used]),
        directions=torch.cat([directions[i] for i in used]) if with_directions else None,
        hook_point=config.hook_point,
        layer=config.layer,
        base_model_name_or_path=portable_name(model.config._name_or_path),
    )
