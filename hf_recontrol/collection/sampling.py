"""How one response is drawn: settings, and numbers of its own."""

from __future__ import annotations

import copy
import json
import os
from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.generation import GenerationMode

from ..data.fingerprints import stable_number, tokenizer_settings
from ..data.prompts import BadRow, Prompts
from ..data.templating import PromptEncoder
from ..modeling.generation import read_padding, read_prompts_once
from ..settings import SamplingSettings

DEFAULT_NEW_TOKENS = 128

# Settings whose processors read a row's token ids or count them, the padding too, and the values that turn them off.
_READS_TOKENS = {
    "bad_words_ids": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "watermarking_config": (),
}


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response, by the generation config, else by the tokenizer."""
    end = model.generation_config.eos_token_id
    if end is None or end == []:
        end = tokenizer.eos_token_id
    return listed_ids(end)


def listed_ids(ids: int | Sequence[int] | None) -> list[int]:
    """The tokens of a setting such as `eos_token_id`, which may name one, several or none."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def few_embeddings(size: int) -> str:
    """What to say of a token that is beyond a model's embeddings."""
    return (
        f"the model has embeddings for {size} tokens: take the tokenizer that belongs to it, or resize it "
        "(`model.resize_token_embeddings(len(tokenizer))`)"
    )


def response_seed(seed: int, prompt_number: int, sample: int) -> list[int]:
    """
    What the noise of one response depends on: the run's seed, the prompt's number in its source, and which of the
    prompt's samples it is. Not on its batch, its file or its process.
    """
    return [seed, prompt_number, sample]


def seed_apart(seed: int, purpose: str) -> int:
    """
    A seed for noise that no run has as its own, whatever seeds runs are given: so what is chosen by responses is not
    chosen by those that something before it was chosen by.
    """
    return stable_number([purpose, seed]) % 2**32


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens a model has embeddings for."""
    embeddings = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None) or len(embeddings.weight)


def pad_token_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """
    A token to pad with that the model knows: the tokenizer's, else one that ends a response, else 0. Padding is always
    masked.
    """
    known = range(vocabulary_size(model))
    return next(token for token in (tokenizer.pad_token_id, *end_token_ids(model, tokenizer), 0) if token in known)


class RowSampler(LogitsProcessor):
    """
    Draws the next token of each row with noise of the row's own: the token with the largest `p_y / E_y`, where the
    `E_y` are standard exponential (an exponential race, as in `torch.multinomial`). Rounding of p by a share ε changes
    a draw with a probability of about ε; inverse transform sampling, which needs one number only, would change the
    draws of all tokens less likely than the rounding of the cumulative sum. It must be the last processor; the drawn
    token's score becomes infinite, so that greedy decoding takes it.

    Args:
        seeds (sequence of `list[int]`):
            For each row, what its noise depends on.
        device (`torch.device`):
            Where the scores are.
    """

    def __init__(self, seeds: Sequence[Sequence[int]], device: torch.device):
        self.on_cpu = device.type == "cpu"
        self.generators = [
            # numpy's are several times as fast on a CPU; elsewhere the noise is made where it is used.
            np.random.Generator(np.random.SFC64(seed))
            if self.on_cpu
            else torch.Generator(device).manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
            for seed in seeds
        ]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty(scores.shape, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            if self.on_cpu:
                generator.standard_exponential(dtype=np.float32, out=row.numpy())
            else:
                row.exponential_(generator=generator)
        # Where both are 0 a masked token would win.
        race = torch.softmax(scores, dim=-1, dtype=torch.float32) / noise.clamp_(min=torch.finfo(noise.dtype).tiny)
        fastest, winners = race.max(-1, keepdim=True)
        if fastest.isnan().any():
            raise FloatingPointError(
                "The model's logits hold NaN, or nothing but -inf, so no token can be drawn: load it in another dtype "
                "(bfloat16 has a wider range than float16)."
            )
        return scores.scatter(1, winners, torch.inf)


class Reweighing(LogitsProcessor, ABC):
    """
    Gives the next tokens of one batch another distribution: called with the scores, of shape `(rows, vocabulary)`,
    that tokens would be drawn from, temperature and all, it returns those that they are drawn from.
    """

    def begin(self, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> None:
        """Called before the batch's first forward, with the padded prompts and what the model is called with."""
        return None


def draw_with(
    prompts: Sequence[Sequence[int]],
    *,
    first: Sequence[LogitsProcessor] = (),
    last: Sequence[LogitsProcessor] = (),
    streamer: TextStreamer | None = None,
) -> Callable[..., torch.LongTensor]:
    """
    A decoding method for `generate(custom_generate=...)`: transformers' own loop with processors before and behind all
    of its own, where `generate(logits_processor=...)` would put them before temperature and top-p. What is drawn is
    the token with the largest score then. `prompts` holds each row's token ids. A `streamer` must be given here too:
    generate() hands it to no such method.
    """

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        generation_config.do_sample = False
        reweighing = [processor for processor in last if isinstance(processor, Reweighing)]
        for processor in reweighing:
            processor.begin(input_ids, model_kwargs)
        if not reweighing:
            read_prompts_once(model, prompts, input_ids, model_kwargs)
        return model._sample(
            input_ids,
            logits_processor=LogitsProcessorList([*first, *logits_processor, *last]),
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=streamer,
            **model_kwargs,
        )

    return decode


def _check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> None:
    """Raise if the model has no embedding of the token to pad with, or can never draw a token that is to end it."""
    size = vocabulary_size(model)
    ends = listed_ids(config.eos_token_id)
    # An end that the tokenizer does not know either is a default of the architecture.
    odd = [("eos_token_id", token) for token in ends if size <= token < len(tokenizer)]
    odd += [("pad_token_id", config.pad_token_id)] if not 0 <= config.pad_token_id < size else []
    for name, token in odd:
        known = tokenizer.convert_ids_to_tokens(token)
        raise ValueError(f"`{name}` is {token} ({known!r}), {few_embeddings(size)}.")


def encode_all(
    encoder: PromptEncoder,
    model: PreTrainedModel,
    prompts: Prompts,
    indices: Sequence[int],
    max_new_tokens: int,
    settings: SamplingSettings,
) -> tuple[dict[int, list[int]], list[BadRow]]:
    """(token ids of each prompt that the model can take and that is no longer than asked for, bad rows)."""
    encoded: dict[int, list[int]] = {}
    bad = []
    for i in indices:
        try:
            ids = encoder.encode(prompts.rows[i])
            _check_ids(model, encoder.tokenizer, ids, max_new_tokens)
            if len(ids) > (settings.max_prompt_tokens or len(ids)):
                raise ValueError(f"it has {len(ids)} tokens, `max_prompt_tokens` is {settings.max_prompt_tokens}")
            # Stored with the response: what cannot be is known before there is one.
            json.dumps(prompts.rows[i])
        except (TypeError, ValueError) as error:
            bad.append(BadRow(prompts.place(i), str(error)))
        else:
            encoded[i] = ids
    encoder.report()
    return encoded, bad


def check_embedded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Raise `ValueError` if the model has no embedding of one of these tokens."""
    size = vocabulary_size(model)
    if max(ids) >= size:
        known = tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(f"the token {known!r} has the id {max(ids)}, {few_embeddings(size)}")


def _check_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], max_new_tokens: int
) -> None:
    check_embedded(model, tokenizer, ids)
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if room is not None and len(ids) + max_new_tokens > room:
        raise ValueError(
            f"prompt and {max_new_tokens} new tokens make {len(ids) + max_new_tokens} tokens, the model has room for "
            f"{room}: lower `max_new_tokens`, or leave it out"
        )


def sampling_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: SamplingSettings
) -> GenerationConfig:
    """
    The complete generation config of rollouts: that of the settings, else plain sampling at temperature 1, with what
    the other settings change.

    Raises:
        `ValueError`: for a mode in which a row's sample cannot depend on its own seed alone, and for several samples
        without sampling. `OSError`: if the named generation config cannot be loaded.
    """
    config = settings.generation_config
    if config is None:
        config = GenerationConfig(do_sample=True, top_k=0)
    elif isinstance(config, (str, os.PathLike)):
        config = GenerationConfig.from_pretrained(config)
    config = copy.deepcopy(config)
    if settings.temperature is not None:
        config.do_sample = settings.temperature > 0
        config.temperature = settings.temperature or None
        if not config.do_sample:
            config.top_p = config.top_k = None
    if settings.top_p is not None and config.do_sample:
        config.top_p = settings.top_p
    stop_strings = settings.stop_strings or config.stop_strings
    if stop_strings:
        config.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not all(isinstance(stop, str) and stop for stop in config.stop_strings):
            raise ValueError(f"A stop string must be a text that is not empty, got {config.stop_strings}.")
    if not (settings.max_new_tokens or config.max_new_tokens) and config.max_length is not None:
        raise ValueError(
            f"`max_length` ({config.max_length}) of the generation config counts the prompt too, so it says no length "
            "of a response: set `max_new_tokens`."
        )
    config.max_new_tokens = settings.max_new_tokens or config.max_new_tokens or DEFAULT_NEW_TOKENS
    if config.eos_token_id is None:
        config.eos_token_id = end_token_ids(model, tokenizer) or None
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id(model, tokenizer)
    _check_tokens(model, tokenizer, config)
    config.return_dict_in_generate = None
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH):
        raise ValueError(
            f"Rollouts are sampled, greedy or beam-searched; this generation config asks for {mode.value}."
        )
    if (config.num_return_sequences or 1) > 1:
        raise ValueError("Ask for several responses with `num_samples`, not with `num_return_sequences`.")
    if settings.num_samples > 1 and not config.do_sample:
        raise ValueError(
            f"{settings.num_samples} samples of a prompt would be the same without sampling: set a temperature."
        )
    return config


def temperature_of(config: GenerationConfig) -> float:
    """What a complete generation config samples at; 0 is greedy."""
    return (1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0


def draw_settings(
    tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, settings: SamplingSettings
) -> dict[str, Any]:
    """What responses depend on beside the model and the prompts, as JSON, with the config of [`sampling_config`]."""
    drawn = {key: value for key, value in config.to_diff_dict().items() if key[0] != "_"}
    drawn.pop("transformers_version", None)
    return {
        **tokenizer_settings(tokenizer),
        "prompt_format": settings.prompt_format,
        "chat_template_kwargs": settings.chat_template_kwargs,
        "num_samples": settings.num_samples,
        "generation_config": drawn,
        "seed": settings.seed,
        **({} if settings.max_prompt_tokens is None else {"max_prompt_tokens": settings.max_prompt_tokens}),
    }


# Settings that cut the distribution which tokens are sampled from, and the values that do not. Greedy search ignores
# them.
_CUTS = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "top_h": (),
    "top_k": (0,),
    "top_p": (1,),
    "typical_p": (1,),
}
# Further settings that draw from another distribution than the model's at a temperature.
_RESHAPES = _CUTS | {
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "suppress_tokens": (),
}


def changes_nothing(name: str, value: Any) -> bool:
    """Whether a setting of a generation config is off: unset, or at the value that leaves the distribution alone."""
    return value is None or value in (_READS_TOKENS | _RESHAPES).get(name, ())


# What generate() takes where nothing is set.
TOP_K_WHERE_UNSET = 50


def reshaped_by(generation_config: dict[str, Any]) -> list[str]:
    """Which settings of a generation config make its draws others than those of the model at a temperature."""
    settings = {"top_k": TOP_K_WHERE_UNSET} | generation_config
    leaves = _READS_TOKENS | _RESHAPES
    found = [f"{name}={settings[name]}" for name in leaves if not changes_nothing(name, settings.get(name))]
    return found if settings.get("do_sample") else ["do_sample=False"]


def draws_from_policy(config: GenerationConfig) -> bool:
    """Whether tokens are drawn from, or are the likeliest of, the model's whole distribution at a temperature."""
    known = config.to_dict() | ({} if config.do_sample else dict.fromkeys(_CUTS))
    return not reshaped_by(known | {"do_sample": True})


def needs_equal_lengths(model: PreTrainedModel, config: GenerationConfig) -> bool:
    """Whether a row's sample would depend on its padding, so that only prompts of one length can share a batch."""
    if not all(changes_nothing(name, getattr(config, name, None)) for name in _READS_TOKENS):
        return True
    return "left" in read_padding(model)
