"""Prompts to responses: sample rollouts, each from its own seed, in memory or part by part into a folder."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration import ControlConfig, ValueHeadConfig
from ..data.prompts import BadRow, Prompt, Prompts, encode_prompt, load_prompts, report_bad_rows
from ..data.rollouts import Rollout, load_rollouts, save_rollouts
from ..data.stage_folder import Progress, StageFolder, control_settings, model_settings, progress_bar
from ..modeling.causal_lm import ReControlForCausalLM
from ..utils.files import make_folder
from .kept_states import KEPT_FOLDER, StateKeeper, has_kept, kept_path, kept_settings, remove_kept
from .sampling import RowSampler, StopStrings, cut_response, needs_equal_lengths, sampling_config

logger = logging.get_logger(__name__)


def pad_batch(rows: Sequence[Sequence[int]], pad_id: int, side: str, device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of shape `(rows, longest)`, padded on `side`."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, part] = torch.tensor(row)
        mask[i, part] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _encode_all(tokenizer, prompts: Prompts, indices: Sequence[int], room: int | None, max_new_tokens: int):
    """(token ids of each prompt that fits, bad rows)."""
    encoded: dict[int, list[int]] = {}
    bad = []
    for i in indices:
        try:
            ids = encode_prompt(tokenizer, prompts.rows[i]["prompt"])
        except (ValueError, TemplateError) as error:
            bad.append(BadRow(f"prompt {prompts.numbers[i]}", str(error)))
            continue
        if room is not None and len(ids) + max_new_tokens > room:
            reason = (
                f"prompt and {max_new_tokens} new tokens make {len(ids) + max_new_tokens} tokens, the model has room "
                f"for {room}: lower `max_new_tokens`, or leave it out"
            )
            bad.append(BadRow(f"prompt {prompts.numbers[i]}", reason))
        else:
            encoded[i] = ids
    return encoded, bad


def _room(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def batches(lengths: Sequence[int], batch_size: int, apart: Sequence[int] | None = None) -> list[list[int]]:
    """Numbers of the rows of each batch, the longest first; rows that differ in `apart` share none."""
    groups: dict[int | None, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        groups.setdefault(None if apart is None else apart[row], []).append(row)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


@dataclass
class _Keep:
    """Which states are kept while sampling, and in which file, by the number of the batch."""

    config: ValueHeadConfig
    settings: dict
    path: Callable[[int], Path]


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    encoded: dict[int, list[int]],
    rows: Sequence[tuple[int, int]],
    config: GenerationConfig,
    batch_size: int,
    seed: int,
    control: ControlConfig | bool,
    advance: Callable[[int], None],
    keep: _Keep | None = None,
) -> list[Rollout]:
    """Rollouts of `rows`, (index of the prompt, number of the sample) each, in their order."""
    # generate() fills what is unset from the model's own generation config, but rollouts are draws from the model
    # itself: no penalties, beams or processors that its authors recommend. A shallow copy leaves the model as it is.
    model = copy.copy(model)
    model.generation_config = GenerationConfig(bos_token_id=model.generation_config.bos_token_id)
    prepare_processors = model._get_logits_processor
    stop_strings, config = config.stop_strings or (), copy.copy(config)
    config.stop_strings = None
    options: dict[str, Any] = {}
    if isinstance(model, ReControlForCausalLM):
        options["control"] = control
    end = config.eos_token_id
    end_ids = [] if end is None else [end] if isinstance(end, int) else list(end)
    temperature = (1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0

    rollouts: list[Rollout | None] = [None] * len(rows)
    lengths = [len(encoded[i]) for i, _ in rows]
    if keep is not None:
        # Reading from inside a compiled graph would break it.
        config.disable_compile = True
    apart = lengths if needs_equal_lengths(model, config) else None
    for number, batch in enumerate(batches(lengths, batch_size, apart)):
        inputs = pad_batch([encoded[rows[k][0]] for k in batch], config.pad_token_id, "left", model.device)
        width = inputs["input_ids"].shape[1]
        seeds = [[seed, prompts.numbers[rows[k][0]], rows[k][1]] for k in batch]
        sampler = RowSampler(seeds, model.device) if config.do_sample else None
        keeper = None if keep is None else StateKeeper(model, keep.config, temperature)

        def with_ours(generation_config, *args, sampler=sampler, keeper=keeper, **kwargs):
            processors = prepare_processors(generation_config, *args, **kwargs)
            if keeper is not None:
                processors.insert(0, keeper)
            if sampler is not None:
                processors.append(sampler)
                # The sampler draws, generate only has to take what it drew.
                generation_config.do_sample = False
            return processors

        # Processors that a caller hands to generate() come between its own ones, before temperature and top-p.
        model._get_logits_processor = with_ours
        if stop_strings:
            options["stopping_criteria"] = [StopStrings(tokenizer, stop_strings, width)]
        with nullcontext() if keeper is None else keeper.reading():
            output = model.generate(**inputs, generation_config=config, **options)
        for k, ids in zip(batch, output[:, width:].tolist(), strict=True):
            i, sample = rows[k]
            text, kept, finished = cut_response(tokenizer, ids, end_ids, stop_strings)
            rollouts[k] = Rollout(
                prompts.rows[i]["prompt"],
                text,
                encoded[i],
                kept,
                finished,
                temperature=temperature,
                columns={key: value for key, value in prompts.rows[i].items() if key != "prompt"},
                prompt_number=prompts.numbers[i],
                sample=sample,
            )
        if keeper is not None:
            keeper.save(keep.path(number), [rollouts[k] for k in batch], keep.settings)
        advance(len(batch))
    return rollouts


def _checked_control(model: PreTrainedModel, control: ControlConfig | bool | None) -> ControlConfig | bool:
    """The control that rollouts are sampled under; `None` is the model's own."""
    if not isinstance(model, ReControlForCausalLM):
        if control:
            raise ValueError("This model has no value head, so rollouts cannot be sampled under a control.")
        return False
    control = model.control if control is None else control
    model._recontrol.check_same_for_all(control)
    return control


def _check_numbers(config: GenerationConfig, num_samples: int, **others: int) -> None:
    for name, value in {"num_samples": num_samples, **others}.items():
        if value < (name != "seed"):
            raise ValueError(f"`{name}` must be at least {int(name != 'seed')}, got {value}.")
    if num_samples > 1 and not config.do_sample:
        raise ValueError(f"{num_samples} samples of a prompt would be the same without sampling: set a temperature.")


def generate_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts | Sequence[Prompt | dict[str, Any]],
    *,
    num_samples: int = 1,
    generation_config: GenerationConfig | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    stop_strings: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
    control: ControlConfig | bool = False,
) -> list[Rollout]:
    """
    Sample responses, in memory.

    A response depends on the model, its prompt, the seed, the prompt's number and the sample's number, not on what
    else is in its batch (up to the rounding of another batch's arithmetic) or on how many processes work. Where
    padding would be read (`repetition_penalty` and other processors that look back, models without an attention mask),
    only prompts of one length share a batch, which is slower.

    Args:
        model, tokenizer:
            A causal language model and its tokenizer.
        prompts ([`Prompts`], or sequence of `str`, chat messages, or rows with a `prompt`):
            What to answer. Further columns of a row are kept for the reward function.
        num_samples (`int`, *optional*, defaults to 1):
            Responses for each prompt; they follow each other in the result.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            How to sample: any settings of sampling, greedy or beam search. Defaults to sampling from the model's whole
            distribution. Nothing is taken from the model's own generation config but the end token.
        max_new_tokens, temperature, top_p, stop_strings (*optional*):
            Change the generation config: tokens drawn at most (128 if nothing says otherwise), temperature (0 is
            greedy), nucleus sampling, and texts that end the turn, such as `"\\n\\nHuman:"` for a base model in a
            dialogue format. The advantage part is fitted to the whole distribution: leave `top_p` at 1 for it.
        batch_size, seed (`int`, *optional*):
            Responses sampled at once, and the seed.
        control ([`ControlConfig`] or `False`, *optional*, defaults to `False`):
            Control of a [`ReControlForCausalLM`], for instance to fit a new V on the controlled policy.

    Returns:
        `list[Rollout]`, in the order of `prompts`.

    Raises:
        `ValueError`: if there are no prompts, one is empty or too long for the model, or the mode cannot be had.
    """
    if not isinstance(prompts, Prompts):
        prompts = load_prompts(prompts)
    config = sampling_config(
        model,
        tokenizer,
        generation_config,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_strings=stop_strings,
    )
    control = _checked_control(model, control)
    _check_numbers(config, num_samples, batch_size=batch_size, seed=seed)
    encoded, bad = _encode_all(tokenizer, prompts, range(len(prompts)), _room(model), config.max_new_tokens)
    report_bad_rows(bad, "error")
    rows = [(i, sample) for i in range(len(prompts)) for sample in range(num_samples)]
    with progress_bar("rollouts", len(rows)) as advance:
        return _sample(model, tokenizer, prompts, encoded, rows, config, batch_size, seed, control, advance)


def write_rollouts(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    num_samples: int = 1,
    generation_config: GenerationConfig | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    stop_strings: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
    control: ControlConfig | bool = False,
    part_size: int = 256,
    on_bad_rows: str = "error",
    keep_states: ValueHeadConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """
    Sample responses into a folder of Parquet files, see [`save_rollouts`] for their columns. Arguments as for
    [`generate_rollouts`], and:

    Args:
        folder (`str` or `os.PathLike`):
            Made if need be. A run that was stopped goes on where it was; of a finished one nothing is done again.
        part_size (`int`, *optional*, defaults to 256):
            Responses in a file: what a stop can cost each process.
        on_bad_rows (`str`, *optional*, defaults to `"error"`):
            What to do with prompts that are too long for the model: `"error"` or `"skip"`.
        keep_states ([`ValueHeadConfig`], *optional*):
            Keep the states at this hook point (with `advantage_sizes` the directions too) as tokens are drawn from
            them, in `kept_states/`, for [`write_states`] to copy instead of a forward of its own. The responses are
            the same. The folder may be removed at any time; what it lacks is read. Not for beam search.
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total) instead of showing a bar.

    Under `accelerate launch` the processes share the parts.

    Returns:
        Counts: `rollouts`, `finished` and `tokens`.

    Raises:
        As [`generate_rollouts`] and [`StageFolder`].
    """
    config = sampling_config(
        model,
        tokenizer,
        generation_config,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_strings=stop_strings,
    )
    control = _checked_control(model, control)
    _check_numbers(config, num_samples, batch_size=batch_size, seed=seed, part_size=part_size)
    if keep_states is not None:
        if not isinstance(keep_states, ValueHeadConfig):
            raise TypeError(
                "`keep_states` must be a ValueHeadConfig, which says where, or None, got "
                f"{type(keep_states).__name__}."
            )
        if (config.num_beams or 1) > 1:
            raise ValueError(
                "States cannot be kept in a beam search, where rows change places: leave `keep_states` out."
            )
        StateKeeper(model, keep_states, temperature=1.0)  # says so if they cannot be read
    rows = [(i, sample) for i in range(len(prompts)) for sample in range(num_samples)]
    settings = {
        **model_settings(model),
        "chat_template": hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest()[:16],
        "prompts": prompts.fingerprint,
        "num_samples": num_samples,
        "generation_config": {key: value for key, value in config.to_diff_dict().items() if key[0] != "_"},
        "seed": seed,
        **control_settings(model, control),
        "part_size": part_size,
    }
    settings["generation_config"].pop("transformers_version", None)
    stage = StageFolder(folder, "rollouts", settings, -(-len(rows) // part_size), ".parquet")
    with stage:
        if stage.is_counted():
            if keep_states is not None and not has_kept(folder):
                logger.warning(f"The rollouts in {folder} are finished, so no states are kept: `states` reads them.")
            return stage.counts()
        if keep_states is not None:
            make_folder(Path(folder) / KEPT_FOLDER)
            settings_kept = kept_settings(model, keep_states, stage.settings)
        parts = {index: rows[index * part_size : (index + 1) * part_size] for index in stage.own_parts()}
        # The prompts of finished parts too, so that the count of bad rows does not depend on earlier stops.
        needed = sorted({i for part in parts.values() for i, _ in part})
        encoded, bad = _encode_all(tokenizer, prompts, needed, _room(model), config.max_new_tokens)
        report_bad_rows(bad, on_bad_rows)
        missing = stage.missing_parts()
        total = sum(len(part) for part in parts.values())
        with progress_bar("rollouts", total, progress, stage.processes.index) as advance:
            advance(sum(len(part) for index, part in parts.items() if index not in missing))
            for index in missing:
                part = [row for row in parts[index] if row[0] in encoded]
                # Of an earlier run that was stopped in this part.
                remove_kept(folder, index)
                keep = None
                if keep_states is not None:
                    keep = _Keep(keep_states, settings_kept, partial(kept_path, folder, index))
                rollouts = _sample(
                    model, tokenizer, prompts, encoded, part, config, batch_size, seed, control, advance, keep
                )
                save_rollouts(rollouts, stage.part_path(index))
        bad_rows = sum(stage.processes.gather(len(bad)))
        more = {"bad_rows": len(prompts.bad_rows) + bad_rows, "dataset": prompts.dataset, "rewards": None}
        return stage.finish(_count_part, more)


def _count_part(path: Path) -> dict[str, float]:
    rollouts = load_rollouts(path)
    return {
        "rollouts": len(rollouts),
        "finished": sum(rollout.finished for rollout in rollouts),
        "tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
    }
