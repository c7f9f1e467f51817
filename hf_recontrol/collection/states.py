"""Rollouts to hidden states: what a head is trained on, read by teacher forcing at its hook point."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration import ControlConfig, ValueHeadConfig
from ..data.rollouts import Rollout, count_rollouts, load_rollouts, rollout_parts, stable_number
from ..data.stage_folder import (
    Progress,
    StageFolder,
    control_settings,
    model_settings,
    place_settings,
    progress_bar,
    read_manifest,
)
from ..data.states import States, StateWriter
from ..modeling.causal_lm import ReControlForCausalLM
from ..modeling.hook_points import hook_width, lm_head_rows
from ..modeling.hooks import read_states
from ..utils.files import atomic_path
from .kept_states import KEPT_FOLDER, KeptStates, has_kept, kept_settings, mean_rows
from .rollouts import batches, pad_batch
from .sampling import reshaped_by

logger = logging.get_logger(__name__)

# Beyond this share of the features' spread int8 is not worth what it saves.
_LARGE_INT8_ERROR = 0.05

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")


def teacher_forced(
    model: PreTrainedModel, rollouts: Sequence[Rollout], keep_logits: bool
) -> tuple[dict[str, torch.Tensor], list[slice]]:
    """
    What to call a model with to see what each token of some responses was drawn from.

    Args:
        rollouts (sequence of [`Rollout`]):
            One batch.
        keep_logits (`bool`):
            Whether logits are kept from the first response's start on only; else at all positions.

    Returns:
        Keyword arguments of the model's forward, and for each response the slice of the kept positions that its tokens
        were drawn from.
    """
    # Padding on the right: under causal attention it changes nothing before it, not even positions.
    inputs = pad_batch([r.prompt_ids + r.completion_ids for r in rollouts], 0, "right", model.device)
    first = 0
    if keep_logits and model._supports_logits_to_keep():
        first = min(len(r.prompt_ids) for r in rollouts) - 1
        inputs["logits_to_keep"] = inputs["input_ids"].shape[1] - first
    starts = [len(r.prompt_ids) - 1 - first for r in rollouts]
    return inputs, [slice(start, start + len(r.completion_ids)) for start, r in zip(starts, rollouts, strict=True)]


def forward_batches(
    model: PreTrainedModel, rollouts: Sequence[Rollout], batch_size: int
) -> tuple[list[list[int]], bool]:
    """
    Which rollouts go through one forward, in an order that wastes little on padding.

    Returns:
        The numbers of each batch's rollouts, and whether a layer is controlled that others follow: its edits reach
        later positions, and generation edits from the prompt's last position on. Then all prompts of a batch are of
        one length, and logits must be kept from their last position on.
    """
    hooks = getattr(model, "_recontrol", None)
    edits_reach_on = hooks is not None and not hooks.is_last_layer and hooks.active_control() is not None
    prompts = [len(rollout.prompt_ids) for rollout in rollouts]
    lengths = [prompt + len(rollout.completion_ids) for prompt, rollout in zip(prompts, rollouts, strict=True)]
    return batches(lengths, batch_size, prompts if edits_reach_on else None), edits_reach_on


def _check(model: PreTrainedModel, rollouts: Sequence[Rollout], config: ValueHeadConfig) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    if max((max(r.prompt_ids + r.completion_ids) for r in rollouts), default=0) >= vocabulary:
        raise ValueError(
            f"The rollouts hold token ids that are not in the model's vocabulary of {vocabulary}: they were sampled "
            "from another model."
        )
    if config.advantage_sizes is not None:
        lm_head_rows(model)


@torch.no_grad()
def _read(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    config: ValueHeadConfig,
    batch_size: int,
    control: ControlConfig | bool,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """(number of the rollout, its states, its directions), in the order of [`forward_batches`]."""
    with_directions = config.advantage_sizes is not None
    in_layer = config.hook_point != "lm_head"
    weight = lm_head_rows(model) if with_directions else None
    settings = contextlib.nullcontext()
    if isinstance(model, ReControlForCausalLM):
        model._recontrol.check_same_for_all(control)
        settings = model._recontrol.call(control)
    with settings:
        together, edits_reach_on = forward_batches(model, rollouts, batch_size)
        for batch in together:
            inputs, parts = teacher_forced(model, [rollouts[i] for i in batch], keep_logits=not in_layer)
            if in_layer and model._supports_logits_to_keep():
                edited = inputs["input_ids"].shape[1] - len(rollouts[batch[0]].prompt_ids) + 1
                inputs["logits_to_keep"] = edited if edits_reach_on else 1
            with read_states(model, config, keep_logits=with_directions) as states:
                logits = model(**inputs, use_cache=False).logits
            for row, (i, part) in enumerate(zip(batch, parts, strict=True)):
                directions = None
                if with_directions:
                    tokens = torch.tensor(rollouts[i].completion_ids, device=weight.device)
                    directions = weight[tokens].float() - mean_rows(logits[row, part], rollouts[i].temperature, weight)
                yield i, states[0][row, part], directions


def _kept_or_read(
    kept: KeptStates | None, model: PreTrainedModel, rollouts: Sequence[Rollout], *settings
) -> Iterator[tuple]:
    """As [`_read`], with the states that were kept while sampling where there are any."""
    rest = []
    for i, rollout in enumerate(rollouts):
        values = kept.find(rollout) if kept else None
        if values is None:
            rest.append(i)
        else:
            yield i, *values
    for i, *values in _read(model, [rollouts[i] for i in rest], *settings):
        yield rest[i], *values


def _small(rollouts: Sequence[Rollout], every: int, num_objectives: int) -> dict[str, torch.Tensor]:
    return {
        "lengths": torch.tensor([math.ceil(len(r.completion_ids) / every) for r in rollouts], dtype=torch.int64),
        # In float64: of rewards that are large next to their spread float32 would keep nothing.
        "rewards": torch.tensor([r.reward for r in rollouts], dtype=torch.float64).reshape(-1, num_objectives),
        "prompts": torch.tensor([stable_number(r.prompt) for r in rollouts], dtype=torch.int64),
        "finished": torch.tensor([r.finished for r in rollouts], dtype=torch.bool),
    }


def collect_states(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    config: ValueHeadConfig,
    *,
    batch_size: int = 16,
    control: ControlConfig | bool = False,
) -> States:
    """
    Read the states of scored rollouts, in memory, in one teacher-forced forward a batch. Under control of the last
    layer the states of a token sequence do not depend on the control, so they are those of generation.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base model, or a controlled one.
        rollouts (sequence of [`Rollout`]):
            Scored rollouts.
        config ([`ValueHeadConfig`]):
            Where to read: its `hook_point` and `layer`. With `advantage_sizes`, the directions are collected too.
        batch_size (`int`, *optional*, defaults to 16):
            Rollouts read at once.
        control ([`ControlConfig`] or `False`, *optional*, defaults to `False`):
            What the rollouts were sampled under: the mean row w̄ is taken under this policy.

    The mean row w̄ is taken at the rollout's sampling temperature (at 1 for greedy ones).

    Raises:
        `ValueError`: if a rollout has no reward, there is none with a token, or the LM head's weight cannot be read.
    """
    if any(rollout.reward is None for rollout in rollouts):
        raise ValueError("A rollout has no reward: score them first (`recontrol label`).")
    rollouts = [rollout for rollout in rollouts if rollout.completion_ids]
    if not rollouts:
        raise ValueError("No rollout has a token: nothing to learn from.")
    _check(model, rollouts, config)
    hidden: dict[int, torch.Tensor] = {}
    directions: dict[int, torch.Tensor] = {}
    with progress_bar("states", len(rollouts)) as advance:
        for i, states, direction in _read(model, rollouts, config, batch_size, control):
            hidden[i] = states.float().cpu()
            if direction is not None:
                directions[i] = direction.cpu()
            advance(1)
    return States(
        hidden=torch.cat([hidden[i] for i in range(len(rollouts))]),
        directions=torch.cat([directions[i] for i in range(len(rollouts))]) if directions else None,
        **_small(rollouts, 1, len(rollouts[0].reward)),
        **place_settings(model, config),
    )


def check_storage(dtype: str, every: int, max_gigabytes: float | None) -> None:
    """Raise `ValueError` if the arguments of [`write_states`] that say what is kept are out of range."""
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {DTYPES}, got {dtype!r}.")
    if every < 1 or (max_gigabytes is not None and not max_gigabytes > 0):
        raise ValueError(f"`every` must be at least 1 and `max_gigabytes` above 0, got {every} and {max_gigabytes}.")


def write_states(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    rollouts: str | os.PathLike,
    config: ValueHeadConfig,
    *,
    batch_size: int = 16,
    control: ControlConfig | bool = False,
    dtype: str = "auto",
    every: int = 1,
    max_gigabytes: float | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """
    Read the states of a folder of scored rollouts into a folder of memory-mapped safetensors files, see [`States`] for
    their tensors. Memory is bounded by the batch. A run that was stopped goes on where it was, and under `accelerate
    launch` the processes share the files.

    Args:
        folder (`str` or `os.PathLike`):
            Made if need be.
        model, config, batch_size, control:
            As for [`collect_states`].
        rollouts (`str` or `os.PathLike`):
            A folder of [`write_rollouts`], scored by [`label_rollouts`]. Responses without a token or a reward are
            left out. States that were kept there while sampling, at this place and by this model under this control,
            are copied; the others are read.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"float32"`, `"bfloat16"`, `"float16"`, `"int8"` (scaled by row and feature; its error is in the counts),
            or `"auto"`: that of the model.
        every (`int`, *optional*, defaults to 1), max_gigabytes (`float`, *optional*):
            Keep one state in `every`, counted back from the last; or as many as fit into so many 10⁹ bytes.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total) instead of showing a bar.

    Returns:
        Counts: `episodes`, `states`, `bytes`; and with int8 `int8_squared_error`, summed over the states: the square
        of the error relative to each feature's spread.

    Raises:
        `ValueError`: as [`collect_states`]; if a state leaves the range of `dtype`. `OSError`: as [`StageFolder`].
    """
    check_storage(dtype, every, max_gigabytes)
    parts = rollout_parts(rollouts)
    manifest = read_manifest(rollouts, "rollouts", "recontrol rollout")
    if manifest["rewards"] is None:
        raise ValueError(f"The rollouts in {rollouts} have no rewards: score them first (`recontrol label`).")
    _check_rewards(parts, manifest["rewards"])
    base = model_settings(model)
    if manifest["settings"]["model"] != base["model"]:
        logger.warning(
            f"The rollouts are those of {manifest['settings']['model']}, the states are read from "
            f"{model.config._name_or_path}."
        )
    reshaped = reshaped_by(manifest["settings"]["generation_config"])
    if config.advantage_sizes is not None and reshaped:
        logger.warning(
            f"The responses were not drawn from the whole distribution ({', '.join(reshaped)}), but the advantage "
            "part is fitted as if they were: sample with a temperature alone for it."
        )
    width = hook_width(model, config)
    stored = getattr(torch, dtype) if dtype != "auto" else model.dtype
    names = ["hidden"] if config.advantage_sizes is None else ["hidden", "directions"]
    if max_gigabytes is not None:
        size = manifest["counts"]["tokens"] * width * stored.itemsize * len(names)
        every = max(every, math.ceil(size / (max_gigabytes * 1e9)))
    place = place_settings(model, config)
    sampled = base | control_settings(model, control)
    settings = {
        **base,
        "rollouts": hashlib.sha256(json.dumps(manifest["parts"], sort_keys=True).encode()).hexdigest(),
        "hook_point": config.hook_point,
        "layer": config.layer,
        "tensors": names,
        "dtype": str(stored).removeprefix("torch."),
        "every": every,
        "control": sampled["control"],
    }
    wanted = kept_settings(model, config, manifest["settings"])
    as_sampled = {name: manifest["settings"].get(name) for name in sampled} == sampled
    if not as_sampled or not has_kept(rollouts, wanted, names):
        if has_kept(rollouts):
            logger.warning(
                f"The states kept in {Path(rollouts) / KEPT_FOLDER} are of another place, model or control, or lack "
                "directions, so states are read anew."
            )
        wanted = None
    stage = StageFolder(folder, "states", settings, len(parts), ".safetensors")
    with stage:
        if stage.is_counted():
            return stage.counts()
        missing = stage.missing_parts()
        total = sum(count_rollouts(parts[index]) for index in stage.own_parts())
        with progress_bar("states", total, progress, stage.processes.index) as advance:
            for index in stage.own_parts():
                part = load_rollouts(parts[index])
                used = [r for r in part if r.completion_ids and r.reward is not None]
                if index in missing:
                    _check(model, used, config)
                    small = _small(used, every, len(manifest["rewards"]))
                    starts = (small["lengths"].cumsum(0) - small["lengths"]).tolist()
                    with (
                        atomic_path(stage.part_path(index)) as path,
                        StateWriter(
                            path, small, int(small["lengths"].sum()), width, stored, names, place | {"every": every}
                        ) as writer,
                    ):
                        kept = KeptStates(rollouts, index, wanted, names, width) if wanted else None
                        for i, *values in _kept_or_read(kept, model, used, config, batch_size, control):
                            chosen = slice((len(used[i].completion_ids) - 1) % every, None, every)
                            for name, value in zip(names, values, strict=False):
                                writer.write(name, starts[i], value[chosen])
                advance(len(part))
        source = {name: manifest.get(name) for name in ("rewards", "dataset", "counts")}
        source["sampling"] = manifest["settings"]["generation_config"]
        counts = stage.finish(_count_part, {"source": source})
        if not counts.get("states"):
            raise ValueError(f"No scored rollout in {rollouts} has a token: nothing to learn from.")
        error = (counts.get("int8_squared_error", 0) / counts["states"]) ** 0.5
        if error > _LARGE_INT8_ERROR and stage.processes.index == 0:
            logger.warning(
                f"int8 keeps these states badly: its error is {error:.1%} of each feature's spread. Use bfloat16."
            )
        return counts


def _check_rewards(parts: Sequence[Path], names: Sequence[str]) -> None:
    """Raise if a reward is the same everywhere, before anything is read for it."""
    known: list[set[float]] = [set() for _ in names]
    for path in parts:
        for rollout in load_rollouts(path):
            for values, value in zip(known, rollout.reward or (), strict=False):
                values.add(value)
        if all(len(values) > 1 for values in known):
            return
    for name, values in zip(names, known, strict=True):
        if len(values) == 1:
            raise ValueError(
                f"All rewards of {name} are equal ({values.pop()}), so there is nothing to learn from it."
            )


def _count_part(path: Path) -> dict[str, float]:
    states = States.open(path)
    size = sum(
        tensor.numel() * tensor.element_size() for tensor in (states.hidden, states.directions) if tensor is not None
    )
    counts = {"episodes": len(states.lengths), "states": len(states.hidden), "bytes": size}
    if states.int8_error is not None:
        counts["int8_squared_error"] = float(states.int8_error) ** 2 * len(states.hidden)
    return counts
