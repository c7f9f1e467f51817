"""Rollouts to states: what a head is trained on, read by teacher forcing at its hook point."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.fingerprints import drawn_by_another, hook_point_settings, model_settings
from ..data.processes import Progress, progress_bar
from ..data.rollouts import Rollout, count_rollouts, episode_tensors, load_rollouts, rollout_parts
from ..data.stage_folder import StageFolder, read_manifest
from ..data.states import States, StateWriter
from ..heads.base_model import check_nameable
from ..heads.value_head import in_eval
from ..modeling.hook_points import HookPoint, lm_head_rows, read_states
from ..modeling.hooks import follow
from ..settings import HookPointSettings, StatesSettings
from ..utils.files import atomic_path
from .batches import as_sampled, control_of, forward_batches, recorded_control, teacher_forced
from .directions import directions, mean_rows, warn_of_other_draws
from .kept_states import KEPT_FOLDER, KeptStates, has_kept, kept_settings
from .state_sizes import count_states, smallest_every, warn_of_full_disk, warn_of_int8

logger = logging.get_logger(__name__)

# What is said of few states where there are directions.
_THINNED = (
    "The static vector and the advantage part lose by it, more than V: each token that is kept is held against what "
    "all tokens up to the next one changed. For them fewer responses with all their states are better."
)

# (number of the rollout, what was read of it by the names of [`States`]).
ReadStates = Iterator[tuple[int, dict[str, torch.Tensor]]]


class _Reader:
    """
    Reads the states of rollouts in one teacher-forced forward a batch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base model, or a controlled one.
        settings ([`HookPointSettings`]):
            Where, and whether the directions too.
        control (`dict`):
            What the rollouts were sampled under, see [`control_of`].
        critic_layer (`int`, *optional*):
            A layer whose states are read too.

    Raises:
        `ValueError`: if the model lacks a head that acted then, or the layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: HookPointSettings,
        control: dict[str, Any],
        critic_layer: int | None = None,
    ):
        check_nameable(model)
        self.model, self.control, self.batch_size = model, control, settings.batch_size
        with as_sampled(model, control):
            pass
        self.hook_point = HookPoint.find(model, settings)
        # The LM head's rows, if directions are read.
        self.weight = lm_head_rows(model) if settings.with_directions else None
        self.context = None
        if critic_layer is not None:
            self.context = HookPoint.find(model, HookPointSettings(hook_point="decoder_layer", layer=critic_layer))

    @cached_property
    def model_settings(self) -> dict[str, Any]:
        """What tells this model from others."""
        return model_settings(self.model)

    @property
    def widths(self) -> dict[str, int]:
        """What is read, and how wide it is."""
        own, context = self.hook_point.width, self.context
        directions = {} if self.weight is None else {"directions": own}
        return {"hidden": own} | directions | ({} if context is None else {"context": context.width})

    @property
    def vocabulary(self) -> dict[str, int]:
        """How many rows the LM head has, if directions are read."""
        return {} if self.weight is None else {"vocabulary_size": len(self.weight)}

    def bytes_a_state(self, dtype: str) -> int:
        """What is stored of one token, in this dtype."""
        return sum(self.widths.values()) * getattr(torch, dtype).itemsize

    def check(self, rollouts: Sequence[Rollout]) -> None:
        """Raise `ValueError` if rollouts are of another model."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if max((max(r.prompt_ids + r.completion_ids) for r in rollouts), default=0) >= vocabulary:
            raise ValueError(
                f"The rollouts hold token ids that are not in the model's vocabulary of {vocabulary}: they were "
                "sampled from another model."
            )

    @torch.no_grad()
    def read(self, rollouts: Sequence[Rollout]) -> ReadStates:
        """The states of each rollout, in the order of [`forward_batches`]."""
        follow(self.model)
        with as_sampled(self.model, self.control), in_eval(self.model):
            keeps_logits = self.hook_point.layer is None
            together, edits_reach_on = forward_batches(self.model, rollouts, self.batch_size, keeps_logits)
            for batch in together:
                chosen = [rollouts[i] for i in batch]
                for i, rollout, read in zip(batch, chosen, self._forward(chosen, edits_reach_on), strict=True):
                    logits = read.pop("logits")
                    if self.weight is not None:
                        mean = mean_rows(logits, rollout.temperature, self.weight)
                        read["directions"] = directions(rollout.completion_ids, mean, self.weight)
                    yield i, read

    def _forward(self, rollouts: Sequence[Rollout], edits_reach_on: bool) -> list[dict[str, torch.Tensor]]:
        """Of each rollout of one batch: its states and its logits, one for each drawn token."""
        in_layer = self.hook_point.layer is not None
        inputs, kept = teacher_forced(self.model, rollouts, keep_logits=not in_layer)
        if in_layer and self.model._supports_logits_to_keep():
            edited = inputs["input_ids"].shape[1] - len(rollouts[0].prompt_ids) + 1
            inputs["logits_to_keep"] = edited if edits_reach_on else 1
        with ExitStack() as stack:
            states = stack.enter_context(read_states(self.hook_point, keep_logits=self.weight is not None))
            context = None if self.context is None else stack.enter_context(read_states(self.context))
            logits = self.model(**inputs, use_cache=False).logits
        found = [{"hidden": states[0][row, part], "logits": logits[row, part]} for row, part in enumerate(kept)]
        for row, rollout in enumerate(rollouts if context else ()):
            # A layer is run at all positions, whatever logits are kept.
            start = len(rollout.prompt_ids) - 1
            found[row]["context"] = context[0][row, start : start + len(rollout.completion_ids)]
        return found

    def read_or_copy(self, rollouts: Sequence[Rollout], kept: KeptStates | None) -> ReadStates:
        """As [`_Reader.read`], with the states that were kept while sampling where there are any."""
        rest = []
        for i, rollout in enumerate(rollouts):
            values = kept.find(rollout) if kept else None
            if values is None:
                rest.append(i)
            else:
                yield i, values
        for i, values in self.read([rollouts[i] for i in rest]):
            yield rest[i], values


def collect_states(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    settings: HookPointSettings | None = None,
    **changes,
) -> States:
    """
    Read the states of scored rollouts, in memory, in one teacher-forced forward a batch, under the control that they
    were sampled under (see [`Rollout`]), whatever is in force. Under control of the last layer the states of a token
    sequence do not depend on the control; the mean row w̄ does, for it is that of the policy.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base model, or a controlled one; with the heads that acted in sampling, under any name.
        rollouts (sequence of [`Rollout`]):
            Scored rollouts. Those without a token are left out, and those that the rewards gave no number for.
        settings ([`HookPointSettings`], *optional*), changes:
            Where to read; single settings as keywords.

    The mean row w̄ is taken at the rollout's sampling temperature (at 1 for greedy ones).

    Raises:
        `ValueError`: if no rollout has a reward, or none with one has a token, the LM head's weight cannot be read, or
        the model lacks a head that acted in sampling, an adapter acts in it, or they were sampled under several
        controls. `TypeError`: if the model is no [`~transformers.PreTrainedModel`].
    """
    settings = HookPointSettings.of(settings, changes)
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    if rollouts and not scored:
        raise ValueError("No rollout has a reward: score them first (`score_rollouts`).")
    if len(scored) < len(rollouts):
        logger.warning(f"{len(rollouts) - len(scored)} of {len(rollouts)} rollouts have no reward and are left out.")
    rollouts = [rollout for rollout in scored if rollout.completion_ids]
    if not rollouts:
        raise ValueError("No rollout has a token: nothing to learn from.")
    reader = _Reader(model, settings, control_of(rollouts))
    reader.check(rollouts)
    found: dict[int, dict[str, torch.Tensor]] = {}
    with progress_bar("states", len(rollouts)) as advance:
        for i, read in reader.read(rollouts):
            found[i] = {name: (x if name == "directions" else x.float()).cpu() for name, x in read.items()}
            advance(1)
    return States(
        **{name: torch.cat([found[i][name] for i in range(len(rollouts))]) for name in reader.widths},
        **episode_tensors(rollouts, 1, len(rollouts[0].reward), any(r.prefix_tokens is not None for r in rollouts)),
        **hook_point_settings(model, settings.hook_point, settings.layer),
        **reader.vocabulary,
    )


def write_states(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    rollouts: str | os.PathLike,
    settings: StatesSettings | None = None,
    *,
    progress: Progress | None = None,
    **changes,
) -> dict[str, float]:
    """
    Read the states of a folder of scored rollouts into a folder of memory-mapped safetensors files, see [`States`] for
    their tensors, under the control that the rollouts were sampled under. Memory is bounded by the batch. A run that
    was stopped resumes there, and under `accelerate launch` the processes share the files.

    Args:
        folder (`str` or `os.PathLike`):
            Made if need be.
        model:
            As for [`collect_states`].
        rollouts (`str` or `os.PathLike`):
            A folder of [`write_rollouts`], scored by [`label_rollouts`]. Responses without a token or a reward are
            left out. States that were kept there while sampling, at this hook point and by this model under this
            control, are copied; the others are read.
        settings ([`StatesSettings`], *optional*), changes:
            Where to read and what to store; single settings as keywords.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total) instead of showing a bar.

    Returns:
        Counts: `episodes`, `states`, `bytes`; and with int8 `int8_squared_error`, summed over the states: the square
        of the error relative to each feature's spread; `int8_squared_error directions` and `int8_squared_error
        context` are those of the directions and of a critic's layer, where they are stored.

    Raises:
        `ValueError`: as [`collect_states`]; if a state leaves the range of its dtype. `OSError`: as [`StageFolder`].
    """
    settings = StatesSettings.of(settings, changes)
    parts = rollout_parts(rollouts)
    manifest = read_manifest(rollouts, "rollouts", "recontrol rollout")
    if manifest["rewards"] is None:
        raise ValueError(f"The rollouts in {rollouts} have no rewards: score them first (`recontrol label`).")
    _check_rewards(rollouts, parts, manifest["rewards"])
    reader = _Reader(model, settings, recorded_control(manifest), settings.critic_layer)
    _warn_of_mismatch(reader, manifest["settings"])
    known = _stage_settings(reader, manifest, settings, parts)
    kept = _usable_kept(reader, Path(rollouts), manifest["settings"])
    stage = StageFolder(folder, "states", known, len(parts), ".safetensors")
    with stage:
        if stage.is_counted():
            return stage.counts()
        if known["every"] > settings.every and reader.weight is not None and stage.processes.index == 0:
            logger.warning(
                f"To fit into {settings.max_gigabytes:g} GB, one state in {known['every']} is kept. {_THINNED}"
            )
        if stage.processes.index == 0:
            missing = [path for index, path in enumerate(parts) if not stage.part_path(index).is_file()]
            warn_of_full_disk(stage.path, missing, reader.bytes_a_state(known["dtype"]), known["every"])
        make_small = partial(
            episode_tensors,
            every=known["every"],
            num_objectives=len(manifest["rewards"]),
            prefixes=manifest.get("prefix_every") is not None,
        )
        make_writer = partial(
            StateWriter,
            widths=reader.widths,
            dtype=getattr(torch, known["dtype"]),
            metadata=hook_point_settings(model, settings.hook_point, settings.layer)
            | {"every": known["every"], "context_layer": settings.critic_layer, **reader.vocabulary},
        )
        _write_parts(stage, reader, parts, make_small, kept, make_writer, progress)
        return _finish(stage, manifest, rollouts)


def _write_parts(
    stage: StageFolder,
    reader: _Reader,
    parts: Sequence[Path],
    make_small: Callable[[Sequence[Rollout]], dict[str, torch.Tensor]],
    kept: Callable[[int], KeptStates | None],
    make_writer: Callable[..., StateWriter],
    progress: Progress | None,
) -> None:
    """Write the parts of this process that are missing, each complete or not at all."""
    every, missing = stage.settings["every"], stage.missing_parts()
    total = sum(count_rollouts(parts[index]) for index in stage.own_parts())
    with progress_bar("states", total, progress, stage.processes.index) as advance:
        for index in stage.own_parts():
            part = load_rollouts(parts[index])
            if index in missing:
                used = [r for r in part if r.completion_ids and r.reward is not None]
                with atomic_path(stage.part_path(index)) as path:
                    _write_part(make_writer(path, make_small(used)), reader, used, kept(index), every)
            advance(len(part))


def _write_part(
    writer: StateWriter, reader: _Reader, rollouts: Sequence[Rollout], kept: KeptStates | None, every: int
) -> None:
    """Write the states of one part's rollouts."""
    with writer:
        reader.check(rollouts)
        for i, values in reader.read_or_copy(rollouts, kept):
            chosen = slice((len(rollouts[i].completion_ids) - 1) % every, None, every)
            for name in reader.widths:
                writer.write(name, i, values[name][chosen])


def _stage_settings(
    reader: _Reader, manifest: dict, settings: StatesSettings, parts: Sequence[Path]
) -> dict[str, Any]:
    """Everything that the stored states depend on."""
    dtype, every = settings.states_dtype, settings.every
    if dtype == "auto":
        dtype = str(reader.model.dtype).removeprefix("torch.")
    if settings.max_gigabytes is not None:
        every = max(every, smallest_every(parts, reader.bytes_a_state(dtype), settings.max_gigabytes))
    return {
        **reader.model_settings,
        "rollouts": hashlib.sha256(json.dumps(manifest["parts"], sort_keys=True).encode()).hexdigest(),
        "hook_point": settings.hook_point,
        "layer": settings.layer,
        "tensors": [*reader.widths, "tokens"],
        **({} if settings.critic_layer is None else {"critic_layer": settings.critic_layer}),
        "dtype": dtype,
        "every": every,
        **reader.control,
    }


def _warn_of_mismatch(reader: _Reader, sampled: dict) -> None:
    """Warn of what does not make the run impossible, but its states or directions doubtful."""
    if said := drawn_by_another(sampled, reader.model_settings, "The rollouts", "the states are read from"):
        logger.warning(f"{said} What a token's direction is to be held against is the policy that drew it.")
    warn_of_other_draws(sampled["generation_config"], reader.weight is not None)


def _usable_kept(reader: _Reader, rollouts: Path, sampled: dict) -> Callable[[int], KeptStates | None]:
    """What gives, for a part's number, the states that were kept for it while sampling, if they are the same ones."""
    wanted = kept_settings(reader.hook_point, sampled)
    ours = reader.model_settings
    if {name: sampled.get(name) for name in ours} == ours and has_kept(rollouts, wanted, list(reader.widths)):
        return lambda index: KeptStates(rollouts, index, wanted, list(reader.widths), reader.hook_point.width)
    if has_kept(rollouts):
        logger.warning(
            f"The states kept in {rollouts / KEPT_FOLDER} are of another hook point or model, or lack "
            "directions or a critic's layer, so states are read anew."
        )
    return lambda index: None


def _finish(stage: StageFolder, manifest: dict, rollouts: str | os.PathLike) -> dict[str, float]:
    source = {name: manifest.get(name) for name in ("rewards", "prefix_every", "dataset", "counts", "head_sources")}
    source["sampling"] = manifest["settings"]["generation_config"]
    counts = stage.finish(count_states, {"source": source})
    if not counts.get("states"):
        raise ValueError(f"No scored rollout in {rollouts} has a token: nothing to learn from.")
    if stage.processes.index == 0:
        warn_of_int8(counts)
    return counts


def _check_rewards(rollouts: str | os.PathLike, parts: Sequence[Path], names: Sequence[str]) -> None:
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
                f"All rewards of {name} are equal ({values.pop()}), so there is nothing to learn from it. Score with "
                f"others, or leave this one out: `recontrol label {rollouts} --reward ... --again`, and then the same "
                "command with these rewards, if it takes any."
            )
