"""Prompts to responses: sample rollouts, each from its own seed, in memory or part by part into a folder."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMode

from .configuration import ControlConfig
from .modeling import ReControlForCausalLM
from .prompts import BadRow, Prompt, Prompts, encode_prompt, load_prompts, report_bad_rows
from .records import Rollout, load_rollouts, save_rollouts
from .stage import Progress, StageFolder, model_fingerprint, model_settings, progress_bar


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


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response, by the generation config, else by the tokenizer."""
    end = model.generation_config.eos_token_id
    if end is None or end == []:
        end = tokenizer.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def pad_token_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with: the tokenizer's, else one that ends a response, else 0. Padding is always masked."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return next(iter(end_token_ids(model, tokenizer)), 0)


class RowSampler(LogitsProcessor):
    """
    Draws the next token of each row from numbers of the row's own: token y is the first with `F(y) > x F(last)`, where
    F is the cumulative distribution and x uniform in [0, 1) (inverse transform sampling). It must be the last
    processor; the drawn token's score becomes infinite, so that greedy decoding takes it.

    Args:
        seeds (sequence of `list[int]`):
            For each row, what its numbers depend on.
        max_new_tokens (`int`), prompt_width (`int`):
            Numbers for each row, and the length of the padded prompts.
    """

    def __init__(self, seeds: Sequence[Sequence[int]], max_new_tokens: int, prompt_width: int, device: torch.device):
        numbers = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
        self.numbers, self.prompt_width = torch.from_numpy(numbers).to(device), prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.prompt_width
        # float64: in float32 the sum over a large vocabulary would round small probabilities away.
        cumulative = torch.softmax(scores, dim=-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, self.numbers[:, step, None] * cumulative[:, -1:], right=True)
        return scores.scatter(1, tokens.clamp(max=scores.shape[-1] - 1), torch.inf)


def _cut(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], end_ids: list[int], stop_strings: Sequence[str]
) -> tuple[str, list[int], bool]:
    """The response up to its turn's end: its text, its tokens with the one that ended the turn, whether it ended."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), None)
    body, kept = ids[:end], ids if end is None else ids[: end + 1]
    text = tokenizer.decode(body, skip_special_tokens=True)

    def stopped(tokens: list[int]) -> bool:
        # A stop string may be a special token, which the text leaves out.
        spelled = tokenizer.decode(tokens)
        return any(stop in spelled for stop in stop_strings)

    if not stopped(body):
        return text, kept, end is not None
    length = next(i for i in range(1, len(body) + 1) if stopped(body[:i]))
    text = tokenizer.decode(body[:length], skip_special_tokens=True)
    return text[: min([text.index(stop) for stop in stop_strings if stop in text], default=None)], body[:length], True


def sampling_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    stop_strings: Sequence[str] = (),
) -> GenerationConfig:
    """
    The complete settings of rollouts: `generation_config`, else plain sampling at temperature 1, with what the other
    arguments change.

    Raises:
        `ValueError`: for a mode in which a row's sample cannot depend on its own seed alone.
    """
    config = (
        GenerationConfig(do_sample=True, top_k=0) if generation_config is None else copy.deepcopy(generation_config)
    )
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if temperature is not None and not temperature >= 0:
        raise ValueError(f"`temperature` must be 0 or above, got {temperature}.")
    if temperature is not None:
        config.do_sample = temperature > 0
        config.temperature = temperature if temperature > 0 else None
        if temperature == 0:
            config.top_p = config.top_k = None
    if top_p is not None and config.do_sample:
        config.top_p = top_p
    if stop_strings:
        config.stop_strings = list(stop_strings)
    elif isinstance(config.stop_strings, str):
        config.stop_strings = [config.stop_strings]
    config.max_new_tokens = max_new_tokens or config.max_new_tokens or 128
    if config.eos_token_id is None:
        config.eos_token_id = end_token_ids(model, tokenizer) or None
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id(model, tokenizer)
    config.return_dict_in_generate = None
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH):
        raise ValueError(
            f"Rollouts are sampled, greedy or beam-searched; this generation config asks for {mode.value}."
        )
    if (config.num_return_sequences or 1) > 1:
        raise ValueError("Ask for several responses with `num_samples`, not with `num_return_sequences`.")
    return config


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
) -> list[Rollout]:
    """Rollouts of `rows`, (index of the prompt, number of the sample) each, in their order."""
    # generate() fills what is unset from the model's own generation config, but rollouts are draws from the model
    # itself: no penalties, beams or processors that its authors recommend. A shallow copy leaves the model as it is.
    model = copy.copy(model)
    model.generation_config = GenerationConfig(bos_token_id=model.generation_config.bos_token_id)
    prepare_processors = model._get_logits_processor
    options: dict[str, Any] = {"tokenizer": tokenizer} if config.stop_strings else {}
    if isinstance(model, ReControlForCausalLM):
        options["control"] = control
    end = config.eos_token_id
    end_ids = [] if end is None else [end] if isinstance(end, int) else list(end)
    temperature = (1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0

    order = sorted(range(len(rows)), key=lambda k: -len(encoded[rows[k][0]]))
    rollouts: list[Rollout | None] = [None] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = pad_batch([encoded[rows[k][0]] for k in batch], config.pad_token_id, "left", model.device)
        width = inputs["input_ids"].shape[1]
        if config.do_sample:
            seeds = [[seed, prompts.numbers[rows[k][0]], rows[k][1]] for k in batch]
            sampler = RowSampler(seeds, config.max_new_tokens, width, model.device)

            def with_sampler(generation_config, *args, sampler=sampler, **kwargs):
                processors = prepare_processors(generation_config, *args, **kwargs)
                processors.append(sampler)
                # The sampler draws, generate only has to take what it drew.
                generation_config.do_sample = False
                return processors

            # Processors that a caller hands to generate() come before temperature and top-p; the sampler must not.
            model._get_logits_processor = with_sampler
        output = model.generate(**inputs, generation_config=config, **options)
        for k, ids in zip(batch, output[:, width:].tolist(), strict=True):
            i, sample = rows[k]
            text, kept, finished = _cut(tokenizer, ids, end_ids, config.stop_strings or ())
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
        advance(len(batch))
    return rollouts


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
    else is in its batch (up to the rounding of another batch's arithmetic) or on how many processes work.
    Processors that look back at the prompt's tokens (`repetition_penalty`, `no_repeat_ngram_size`, `min_length`) see
    its padding, and models without an attention mask (xLSTM) read it: with these the batch does matter.

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
    _check_numbers(config, num_samples, batch_size=batch_size, seed=seed, part_size=part_size)
    rows = [(i, sample) for i in range(len(prompts)) for sample in range(num_samples)]
    settings = {
        **model_settings(model),
        "chat_template": hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest()[:16],
        "prompts": prompts.fingerprint,
        "num_samples": num_samples,
        "generation_config": {key: value for key, value in config.to_diff_dict().items() if key[0] != "_"},
        "seed": seed,
        "control": control.to_dict() if isinstance(control, ControlConfig) else control,
        "head_fingerprint": model_fingerprint(model.value_head) if control is not False else None,
        "part_size": part_size,
    }
    settings["generation_config"].pop("transformers_version", None)
    stage = StageFolder(folder, "rollouts", settings, -(-len(rows) // part_size), ".parquet")
    with stage:
        if stage.is_counted():
            return stage.counts()
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
                rollouts = _sample(
                    model, tokenizer, prompts, encoded, part, config, batch_size, seed, control, advance
                )
                save_rollouts(rollouts, stage.part_path(index))
        bad_rows = sum(stage.processes.gather(len(bad)))
        return stage.finish(_count_part, {"bad_rows": len(prompts.bad_rows) + bad_rows, "rewards": None})


def _count_part(path: Path) -> dict[str, float]:
    rollouts = load_rollouts(path)
    return {
        "rollouts": len(rollouts),
        "finished": sum(rollout.finished for rollout in rollouts),
        "tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
    }
