"""Rollouts: one response to one prompt each, and the Parquet files that hold many."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..utils.extras import needs_extra
from ..utils.files import atomic_path
from .fingerprints import prompt_hash
from .prompts import Prompt
from .stage_folder import checked_parts

_METADATA_KEY = b"hf_recontrol"
# What was measured of each response stands in columns of its own, behind those of [`Rollout`].
_MEASURED = "measured."


@dataclass
class Rollout:
    """
    One response to one prompt.

    Args:
        prompt (`str` or `list[dict[str, Any]]`), completion (`str`):
            What was asked and what was answered. `completion` ends where the turn ends.
        prompt_ids, completion_ids (`list[int]`):
            The tokens the model saw and drew. The last drawn one is the token that ended the turn, if `finished`.
        finished (`bool`):
            Whether the model ended its turn; otherwise the response was cut at the token limit.
        reward (`list[float]`, *optional*):
            One reward for each objective; `None` where there is none (yet).
        prefix_tokens (`list[int]`, *optional*), prefix_rewards (`list[list[float]]`, *optional*):
            The rewards of the response so far: after how many tokens, and one for each objective each time.
        temperature (`float`, *optional*, defaults to 1.0):
            What the response was sampled at; 0 is greedy.
        columns (`dict[str, Any]`):
            Further columns of the prompt's row, handed to reward functions.
        prompt_number, sample (`int`, *optional*, default to 0):
            Which row of the prompts this answers, and which of its samples this is.
        control (`dict[str, Any]`, *optional*):
            What the response was sampled under: `control`, the settings of [`ControlConfig`], and `heads`, for each
            head that acted its name, weight and fingerprint. `None`: the base alone.

    Raises:
        `TypeError`: if the token ids or the reward are no lists; names the field.
    """

    prompt: Prompt
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]
    finished: bool
    reward: list[float] | None = None
    temperature: float = 1.0
    columns: dict[str, Any] = field(default_factory=dict)
    prompt_number: int = 0
    sample: int = 0
    control: dict[str, Any] | None = None
    prefix_tokens: list[int] | None = None
    prefix_rewards: list[list[float]] | None = None

    def __post_init__(self):
        if not isinstance(self.prompt_ids, list) or not isinstance(self.completion_ids, list):
            name = "completion_ids" if isinstance(self.prompt_ids, list) else "prompt_ids"
            raise TypeError(f"`{name}` must be a list of token ids, got {type(getattr(self, name)).__name__}.")
        if self.reward is not None and not isinstance(self.reward, (list, tuple)):
            raise TypeError(
                f"`reward` must be a list with one number for each objective, such as [0.7], got {self.reward!r}."
            )


def numbers_so_far(rollout: Rollout, every: int) -> range:
    """After how many tokens there is a response so far: after every k-th one but the last."""
    return range(every, len(rollout.completion_ids), every)


def responses_so_far(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, every: int) -> Iterator[Rollout]:
    """The response after every k-th token but the last one, as rollouts that are not finished."""
    ids = rollout.completion_ids
    for count in numbers_so_far(rollout, every):
        yield replace(
            rollout,
            completion=_decoded(ids[:count], rollout, tokenizer),
            completion_ids=ids[:count],
            finished=False,
        )


def _decoded(ids: list[int], rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> str:
    # A stop string ends the completion before its last tokens, and the last character may not be whole yet.
    return tokenizer.decode(ids, skip_special_tokens=True)[: len(rollout.completion)].rstrip("\ufffd")


def is_decoded_by(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer makes a rollout's completion of its tokens."""
    return _decoded(rollout.completion_ids, rollout, tokenizer) == rollout.completion.rstrip("\ufffd")


def _parquet():
    with needs_extra("train", "Reading and writing Parquet files"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow


def _kind_of_prompts(rollouts: Sequence[Rollout]) -> str:
    """How prompts are stored: `"text"`, `"messages"` (their values are all texts), or `"json"`."""
    prompts = [rollout.prompt for rollout in rollouts]
    if all(isinstance(prompt, str) for prompt in prompts):
        return "text"
    all_texts = all(
        isinstance(prompt, list) and prompt and all(m and all(isinstance(v, str) for v in m.values()) for m in prompt)
        for prompt in prompts
    )
    return "messages" if all_texts else "json"


def save_rollouts(
    rollouts: Sequence[Rollout],
    path: str | os.PathLike,
    rewards: Sequence[str] | None = None,
    scoring: int | None = None,
    scored: dict[str, int] | None = None,
    measured: dict[str, Sequence[float | None]] | None = None,
) -> None:
    """
    Write rollouts as a Parquet file with the columns of [`Rollout`]: `prompt` is a text, a list of messages, or JSON
    if messages hold more than texts; `reward` is a number, or a list if there are several objectives; `columns` and
    `control` are JSON; the columns of the response so far stand there only if a rollout has them.

    Args:
        rewards (sequence of `str`, *optional*), scoring (`int`, *optional*), scored (`dict[str, int]`, *optional*):
            Names of the rewards, which scoring of the folder they are from, and how many rollouts each function
            scored; kept in the file's metadata.
        measured (`dict[str, sequence]`, *optional*):
            Numbers of each rollout, by name, see [`load_measured`].
    """
    pa = _parquet()
    measured = {f"{_MEASURED}{name}": list(values) for name, values in (measured or {}).items()}
    kind = _kind_of_prompts(rollouts)
    keys = sorted({key for r in rollouts if kind == "messages" for message in r.prompt for key in message})
    objectives = max((len(r.reward) for r in rollouts if r.reward is not None), default=1)
    ids = pa.list_(pa.int32())
    with_prefixes = any(rollout.prefix_tokens is not None for rollout in rollouts)
    prefixes = {"prefix_tokens": ids, "prefix_rewards": pa.list_(pa.list_(pa.float64()))} if with_prefixes else {}
    schema = pa.schema(
        {
            "prompt": pa.list_(pa.struct({key: pa.string() for key in keys})) if keys else pa.string(),
            "completion": pa.string(),
            "prompt_ids": ids,
            "completion_ids": ids,
            "finished": pa.bool_(),
            "reward": pa.float64() if objectives == 1 else pa.list_(pa.float64()),
            "temperature": pa.float64(),
            "columns": pa.string(),
            "prompt_number": pa.int64(),
            "sample": pa.int32(),
            "control": pa.string(),
            **prefixes,
            **dict.fromkeys(measured, pa.float64()),
        },
        metadata={
            _METADATA_KEY: json.dumps({"rewards": rewards, "scoring": scoring, "scored": scored, "prompt": kind})
        },
    )
    rows = []
    for number, rollout in enumerate(rollouts):
        row = asdict(rollout) | {"columns": json.dumps(rollout.columns, ensure_ascii=False)}
        row |= {name: values[number] for name, values in measured.items()}
        if kind == "json":
            row["prompt"] = json.dumps(rollout.prompt, ensure_ascii=False)
        if rollout.control is not None:
            row["control"] = json.dumps(rollout.control)
        if rollout.reward is not None and objectives == 1:
            row["reward"] = rollout.reward[0]
        rows.append(row)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pa.parquet.write_table(pa.Table.from_pylist(rows, schema), temporary)


def load_rollouts(path: str | os.PathLike) -> list[Rollout]:
    """
    Read what [`save_rollouts`] wrote: one Parquet file, or all parts of a folder of `recontrol rollout`.

    Raises:
        `OSError`, `ValueError`: names the file.
    """
    path = Path(path)
    if path.is_dir():
        return [rollout for part in rollout_parts(path) for rollout in load_rollouts(part)]
    if not path.is_file():
        raise OSError(f"{path} is no file or folder: make rollouts with `recontrol rollout`.")
    pa = _parquet()
    try:
        rows = pa.parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a complete Parquet file ({error}).") from error
    is_json = _metadata(path).get("prompt") == "json"
    rollouts = []
    for row in rows:
        row = {name: value for name, value in row.items() if not name.startswith(_MEASURED)}
        try:
            if is_json:
                row["prompt"] = json.loads(row["prompt"])
            elif not isinstance(row["prompt"], str):
                row["prompt"] = [{k: v for k, v in message.items() if v is not None} for message in row["prompt"]]
            if row["reward"] is not None and not isinstance(row["reward"], list):
                row["reward"] = [row["reward"]]
            # Files of the base alone may lack the column.
            control = row.get("control")
            row |= {"columns": json.loads(row["columns"]), "control": None if control is None else json.loads(control)}
            rollouts.append(Rollout(**row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not hold rollouts ({error}): make them with `recontrol rollout`."
            ) from error
    return rollouts


def load_measured(path: Path) -> dict[str, list[float | None]]:
    """What was measured of each rollout of a Parquet file, by name."""
    table = _parquet().parquet.read_table(path)
    names = [name for name in table.column_names if name.startswith(_MEASURED)]
    return {name.removeprefix(_MEASURED): table[name].to_pylist() for name in names}


def columns_of(parts: Iterable[Path]) -> set[str]:
    """The columns beside the prompt that rollouts in Parquet files have, of the first file that holds any."""
    return next((set(rollout.columns) for part in parts for rollout in load_rollouts(part)), set())


def count_rollouts(path: Path) -> int:
    """How many rollouts a Parquet file holds, by its footer."""
    return _parquet().parquet.read_metadata(path).num_rows


def response_lengths(path: Path) -> np.ndarray:
    """How many tokens each response with a reward in a Parquet file of rollouts has; nothing else is read."""
    pa = _parquet()
    table = pa.parquet.read_table(path, columns=["completion_ids", "reward"])
    with_reward = table.filter(table["reward"].is_valid())
    return np.array([len(ids) for ids in with_reward["completion_ids"]], dtype=np.int64)


def scoring_of(path: Path) -> int | None:
    """Which scoring the rewards in a Parquet file of rollouts are from, or `None` if it has not been scored."""
    return _metadata(path).get("scoring")


def scored_by(path: Path) -> dict[str, int]:
    """How many rollouts in a Parquet file each reward function scored."""
    return _metadata(path).get("scored") or {}


def _metadata(path: Path) -> dict[str, Any]:
    pa = _parquet()
    try:
        schema = pa.parquet.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a complete Parquet file ({error}).") from error
    try:
        return dict(json.loads((schema.metadata or {}).get(_METADATA_KEY, b"{}")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold rollouts ({error}): make them with `recontrol rollout`.") from error


def rollout_parts(folder: str | os.PathLike) -> list[Path]:
    """
    The Parquet files of a finished folder of rollouts, in their order.

    Raises:
        `OSError`, `ValueError`: if the folder holds no finished rollouts, or a file is not the one that the manifest
        names; says which.
    """
    # A scoring anew has another number in every file, so states that were made of the last one are refused.
    then = ", then `recontrol label ... --again`, then states and heads anew in other folders"
    return checked_parts(folder, "rollouts", "recontrol rollout", then)


def episode_tensors(
    rollouts: Sequence[Rollout], every: int, num_objectives: int, prefixes: bool
) -> dict[str, torch.Tensor]:
    """The tensors of `States` that need no model; the rewards of the response so far if asked for."""
    so_far = [torch.empty(0, num_objectives, dtype=torch.float64)]
    so_far += [_so_far(rollout, every, num_objectives) for rollout in rollouts if prefixes]
    return {
        "lengths": torch.tensor([math.ceil(len(r.completion_ids) / every) for r in rollouts], dtype=torch.int64),
        # In float64: of rewards that are large next to their spread float32 would keep nothing.
        "rewards": torch.tensor([r.reward for r in rollouts], dtype=torch.float64).reshape(-1, num_objectives),
        "prompts": torch.tensor([prompt_hash(r.prompt) for r in rollouts], dtype=torch.int64),
        "finished": torch.tensor([r.finished for r in rollouts], dtype=torch.bool),
        "tokens": torch.tensor([y for r in rollouts for y in _kept(r.completion_ids, every)], dtype=torch.int64),
        **({"prefix_rewards": torch.cat(so_far)} if prefixes else {}),
    }


def _so_far(rollout: Rollout, every: int, num_objectives: int) -> torch.Tensor:
    """The rewards of the response so far at each state that is kept, `(states, objectives)`; NaN where unknown."""
    tokens = len(rollout.completion_ids)
    # In float64, as the rewards are.
    rewards = torch.full((tokens, num_objectives), torch.nan, dtype=torch.float64)
    for start, values in zip(rollout.prefix_tokens or (), rollout.prefix_rewards or (), strict=True):
        rewards[start:] = torch.tensor(values, dtype=torch.float64)
    return _kept(rewards, every)


def _kept(values: Any, every: int) -> Any:
    """Of one value for each token those of the states that are kept: one in so many, counted back from the last."""
    return values[(len(values) - 1) % every :: every]
