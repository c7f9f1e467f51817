"""Prompts to responses: sample rollouts of a model and keep them with their token ids."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration import ControlConfig
from .files import atomic_path
from .modeling import ReControlForCausalLM

logger = logging.get_logger(__name__)

# A prompt is a text or a list of chat messages {"role": ..., "content": ...}.
Prompt = str | list[dict[str, str]]


@dataclass
class Rollout:
    """
    One response to one prompt.

    Args:
        prompt (`str` or `list[dict[str, str]]`), completion (`str`):
            What was asked and what was answered. `completion` ends where the turn ends.
        prompt_ids, completion_ids (`list[int]`):
            The tokens the model saw and drew. The last drawn one is the token that ended the turn, if `finished`.
        finished (`bool`):
            Whether the model ended its turn; otherwise the response was cut at the token limit.
        reward (`list[float]`, *optional*):
            One reward for each objective.
        temperature (`float`, *optional*, defaults to 1.0):
            What the response was sampled at; 0 is greedy.
        columns (`dict[str, Any]`):
            Further columns of the prompt's row, handed to reward functions.
    """

    prompt: Prompt
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]
    finished: bool
    reward: list[float] | None = None
    temperature: float = 1.0
    columns: dict[str, Any] = field(default_factory=dict)


def _read_rows(path: str | os.PathLike) -> list[tuple[str, Any]]:
    """(place, row) of each non-empty line of a JSONL file."""
    path = Path(path)
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append((f"{path}, line {number}", json.loads(line)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {len(rows) + 1} or after: not JSON ({error}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise OSError(f"{path} is no file: name a JSONL file.") from error
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def load_prompts(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Rows of a JSONL file, each with at least `prompt`: a text or a list of chat messages.

    Raises:
        `OSError`, `ValueError`: names the file and the line.
    """
    rows = _read_rows(path)
    for place, row in rows:
        prompt = row.get("prompt") if isinstance(row, dict) else None
        is_chat = isinstance(prompt, list) and all(
            isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in prompt
        )
        if not prompt or not (isinstance(prompt, str) or is_chat):
            raise ValueError(f"{place}: expected an object whose `prompt` is a text or a list of chat messages.")
    return [row for _, row in rows]


def save_rollouts(rollouts: Iterable[Rollout], path: str | os.PathLike) -> None:
    """Write rollouts as JSONL, one object a line with the fields of [`Rollout`]."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for rollout in rollouts:
            file.write(json.dumps(asdict(rollout), ensure_ascii=False) + "\n")


def load_rollouts(path: str | os.PathLike) -> list[Rollout]:
    """
    Read what [`save_rollouts`] wrote.

    Raises:
        `OSError`, `ValueError`: names the file and the line.
    """
    names = {item.name for item in fields(Rollout)}
    rollouts = []
    for place, row in _read_rows(path):
        try:
            rollouts.append(Rollout(**{name: value for name, value in row.items() if name in names}))
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{place}: not a rollout ({error}). Make rollouts with `recontrol rollout`.") from error
    return rollouts


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """
    Token ids of a prompt. Chat messages, and texts if the tokenizer has a chat template, go through the template (a
    text as the user's message); other texts are tokenized as they are.

    Raises:
        `ValueError`: for chat messages and a tokenizer without a chat template, or a prompt without tokens.
    """
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        ids = tokenizer(prompt)["input_ids"]
    else:
        if tokenizer.chat_template is None:
            raise ValueError("The prompt is a list of chat messages, but the tokenizer has no chat template.")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise ValueError(f"The prompt {prompt!r} has no tokens.")
    return list(ids)


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


def generate_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | dict[str, Any]],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_strings: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
    control: ControlConfig | bool = False,
) -> list[Rollout]:
    """
    Sample responses.

    Args:
        model, tokenizer:
            A causal language model and its tokenizer.
        prompts (sequence of `str`, chat messages, or rows with a `prompt`):
            What to answer. Further columns of a row are kept for the reward function.
        num_samples (`int`, *optional*, defaults to 1):
            Responses for each prompt; they follow each other in the result.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Tokens drawn at most for each response.
        temperature, top_p (`float`, *optional*, default to 1.0):
            Sampling. At temperature 0 the likeliest token is taken. Nothing else of the model's generation config is
            used. The advantage part is fitted to the whole distribution: leave `top_p` at 1 for it.
        stop_strings (sequence of `str`, *optional*):
            Texts that end the turn, such as `"\\n\\nHuman:"` for a base model in a dialogue format.
        batch_size, seed (`int`, *optional*):
            Responses sampled at once, and the seed. The samples depend on both.
        control ([`ControlConfig`] or `False`, *optional*, defaults to `False`):
            Control of a [`ReControlForCausalLM`]. Training data come from the uncontrolled model.

    Returns:
        `list[Rollout]`, in the order of `prompts`.

    Raises:
        `ValueError`: if there are no prompts, or one is empty or too long for the model.
    """
    if len(prompts) == 0:
        raise ValueError("No prompts to answer.")
    rows = [dict(prompt) if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts]
    encoded = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    longest = max(map(len, encoded)) + max_new_tokens
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(
            f"The longest prompt and {max_new_tokens} new tokens make {longest} tokens, the model has room for "
            f"{context}: leave out long prompts or lower `max_new_tokens`."
        )
    end_ids = end_token_ids(model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=end_ids or None,
        pad_token_id=pad_token_id(model, tokenizer),
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
        **({"stop_strings": list(stop_strings)} if stop_strings else {}),
    )
    # generate() fills what is unset from the model's own generation config, but rollouts are draws from the model
    # itself: no penalties, beams or processors that its authors recommend. A shallow copy leaves the model as it is.
    model = copy.copy(model)
    model.generation_config = GenerationConfig(bos_token_id=model.generation_config.bos_token_id)
    options: dict[str, Any] = {"tokenizer": tokenizer} if stop_strings else {}
    if isinstance(model, ReControlForCausalLM):
        options["control"] = control

    order = sorted((i for i in range(len(rows)) for _ in range(num_samples)), key=lambda i: -len(encoded[i]))
    samples: dict[int, list[Rollout]] = {i: [] for i in range(len(rows))}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        with logging.tqdm(total=len(order), desc="rollouts") as progress:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                inputs = pad_batch([encoded[i] for i in batch], settings.pad_token_id, "left", model.device)
                output = model.generate(**inputs, generation_config=settings, **options)
                for i, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                    text, kept, finished = _cut(tokenizer, ids, end_ids, stop_strings)
                    columns = {key: value for key, value in rows[i].items() if key != "prompt"}
                    rollout = Rollout(
                        rows[i]["prompt"], text, encoded[i], kept, finished, temperature=temperature, columns=columns
                    )
                    samples[i].append(rollout)
                progress.update(len(batch))
    return [rollout for i in range(len(rows)) for rollout in samples[i]]
