"""Responses to rewards: a function with TRL's signature, a column of the data, or a sequence classifier."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import math
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .prompts import BadRow, Prompt, Prompts, report_bad_rows
from .records import Rollout, count_rollouts, load_rollouts, save_rollouts, scoring_of
from .stage import (
    MANIFEST_NAME,
    Processes,
    Progress,
    StageFolder,
    file_checksum,
    model_fingerprint,
    progress_bar,
    read_manifest,
)

# TRL's signature: f(prompts, completions, **kwargs) -> list[float], one reward for each pair. Further columns of the
# data come as keyword arguments, lists of the same length.
RewardFunction = Callable[..., Sequence[float]]


class MissingColumnError(ValueError):
    """The data lack the column that a reward names."""


class ClassifierReward:
    """
    The score of a sequence-classification model, as a reward function.

    Args:
        model ([`~transformers.PreTrainedModel`]), tokenizer:
            A classifier with one label (a reward model), or with several and a `label` to take.
        label (`str`, *optional*):
            The label whose logit is the reward, by its name in `config.id2label`.
        batch_size (`int`, *optional*, defaults to 32):
            Texts scored at once; one at a time if tokenizer or model have no padding token.

    With a chat template prompt and response are scored as a chat; otherwise as a pair of texts.

    Raises:
        `ValueError`: if the model has several labels and `label` is none of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        label: str | None = None,
        batch_size: int = 32,
    ):
        labels = model.config.id2label
        if label is None and len(labels) == 1:
            self.index = 0
        elif label in labels.values():
            self.index = {name: index for index, name in labels.items()}[label]
        else:
            raise ValueError(f"`label` must be one of the classifier's {list(labels.values())}, got {label!r}.")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        if tokenizer.pad_token is None or model.config.pad_token_id is None:
            self.batch_size = 1
        self.__name__ = getattr(model.config, "_name_or_path", "") or type(model).__name__

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, label: str | None = None, **kwargs) -> ClassifierReward:
        """Load classifier and tokenizer from a folder or the Hub; `kwargs` as for the model's `from_pretrained`."""
        shared = {key: kwargs[key] for key in ("token", "revision", "cache_dir", "subfolder") if key in kwargs}
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, **kwargs)
        return cls(model, AutoTokenizer.from_pretrained(name_or_path, **shared), label=label)

    def _encode(self, prompts: Sequence[Prompt], completions: Sequence[str]):
        # RoBERTa's kind has two more positions than it has room for tokens; some tokenizers name no limit.
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        longest = min((limit for limit in limits if limit is not None and limit < 10**9), default=None)
        options = {
            "padding": self.batch_size > 1,
            # On the right, so that position embeddings do not depend on the batch.
            "padding_side": "right",
            "truncation": longest is not None,
            "max_length": longest,
            "return_tensors": "pt",
        }
        if self.tokenizer.chat_template is not None:
            chats = [
                [
                    *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt),
                    {"role": "assistant", "content": completion},
                ]
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            return self.tokenizer.apply_chat_template(chats, return_dict=True, **options)
        texts = [p if isinstance(p, str) else "\n\n".join(message["content"] for message in p) for p in prompts]
        return self.tokenizer(texts, list(completions), **options)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **kwargs) -> list[float]:
        # By length, so that little is spent on padding.
        order = sorted(range(len(prompts)), key=lambda i: len(completions[i]) + len(str(prompts[i])))
        rewards = [0.0] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            inputs = self._encode([prompts[i] for i in chosen], [completions[i] for i in chosen])
            logits = self.model(**inputs.to(self.model.device)).logits[:, self.index]
            for i, value in zip(chosen, logits.float().tolist(), strict=True):
                rewards[i] = value
        return rewards


def vader(prompts: Sequence[str], completions: Sequence[str], **kwargs) -> list[float]:
    """
    VADER's compound sentiment of the response, in [-1, 1]: the reward of the demo.

    Raises:
        `ImportError`: if `vaderSentiment` is not installed; names the extra.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("The VADER reward needs `pip install 'hf_recontrol[demo]'`.") from error
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(completion)["compound"] for completion in completions]


def load_reward(spec: str, columns: Collection[str] = ()) -> RewardFunction:
    """
    A reward function from its description.

    Args:
        spec (`str`):
            `"module:function"` (also a module in the current folder), `"column:NAME"` or just the name of one of
            `columns` for a column of the data, or the folder or Hub name of a sequence classifier, `"name"` or
            `"name#LABEL"` if it has several labels. A classifier computes where this process does (its accelerator).
        columns (collection of `str`, *optional*):
            The columns that the data have.

    Raises:
        `ValueError`, `OSError`: if there is no such thing.
    """
    if (column := reward_column(spec, columns)) is not None:
        return _column(column)
    module_name, colon, function_name = spec.partition(":")
    if colon and all(part.isidentifier() for part in module_name.split(".")) and function_name.isidentifier():
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name.split(".")[0] and error.name != module_name:
                raise
            raise ValueError(f"No module {module_name!r} for the reward {spec!r}: is it installed or here?") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ValueError(f"The module {module_name!r} has no function {function_name!r}.")
        return function
    name, _, label = spec.partition("#")
    reward = ClassifierReward.from_pretrained(name, label=label or None)
    reward.model.to(Processes().device)
    return reward


def reward_column(spec: str, columns: Collection[str]) -> str | None:
    """The column that a reward's description names, or `None` if it names something else."""
    if spec in columns:
        return spec
    return spec.removeprefix("column:") if spec.startswith("column:") else None


def check_columns(specs: Sequence[str], prompts: Prompts) -> None:
    """
    Check the columns that rewards name, before any response is sampled.

    Raises:
        `ValueError`: if there is no such column, or it holds something that is no finite number; names the rows.
    """
    for column in (reward_column(spec, prompts.rows[0]) for spec in specs):
        if column is None:
            continue
        if column not in prompts.rows[0]:
            raise MissingColumnError(f"The data have no column {column!r}, they have {sorted(prompts.rows[0])}.")
        bad = [
            BadRow(f"prompt {number}", f"the column {column} holds {row[column]!r}, expected a finite number")
            for number, row in zip(prompts.numbers, prompts.rows, strict=True)
            if _finite(row[column]) is None
        ]
        report_bad_rows(bad, "error")


def _column(name: str) -> RewardFunction:
    def reward(prompts, completions, **columns):
        if name not in columns:
            raise MissingColumnError(f"The data have no column {name!r}, they have {sorted(columns)}.")
        return columns[name]

    reward.__name__ = name
    return reward


def reward_name(function: RewardFunction) -> str:
    """What a reward is called in messages, files and reports."""
    return getattr(function, "__name__", type(function).__name__)


def reward_fingerprint(function: RewardFunction) -> str:
    """
    A hash that tells a reward from another of the same name: of a classifier's weights, else of the function's own
    source (not of what it calls).
    """
    if isinstance(function, ClassifierReward):
        return f"{model_fingerprint(function.model)}/{function.index}"
    known = function.func if isinstance(function, partial) else function
    code = getattr(inspect.unwrap(known), "__code__", None)
    if code is not None and reward_name(known) == "<lambda>":
        text = f"{code.co_code} {code.co_consts} {code.co_names}"  # its line holds other things too
    else:
        try:
            text = textwrap.dedent(inspect.getsource(known if code is not None else type(known)))
        except (OSError, TypeError):  # made in an interpreter, or not in Python
            text = reward_name(function)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def by_name(rewards: Sequence[RewardFunction], names: Sequence[str] | None = None) -> dict[str, RewardFunction]:
    """
    Reward functions by their own names, or by `names`.

    Raises:
        `ValueError`: if two have the same.
    """
    names = [reward_name(function) for function in rewards] if names is None else names
    if len(set(names)) < len(names):
        raise ValueError(f"Two rewards have the same name: {list(names)}. Give each its own.")
    return dict(zip(names, rewards, strict=True))


def _finite(value: Any) -> float | None:
    """The reward as a float, or `None` where it is no finite number."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, np.generic):
        value = value.item()
    try:
        # Training computes in float32.
        return float(value) if isinstance(value, Real) and abs(value) <= torch.finfo(torch.float32).max else None
    except OverflowError:
        return None


def score_rollouts(
    rollouts: Sequence[Rollout], *rewards: RewardFunction, on_bad_rows: str = "error", source: str = "rollouts"
) -> list[Rollout]:
    """
    Rollouts with their rewards, one for each function (one objective each). What is scored is the completion as it is
    stored, cut where the turn ends.

    Args:
        on_bad_rows (`str`, *optional*, defaults to `"error"`):
            What to do when a reward is no finite number: `"error"`, or `"skip"`, which leaves the rollout's reward
            `None` (it is then not trained on) and warns.
        source (`str`, *optional*):
            Where the rollouts are from, for messages.

    Raises:
        `ValueError`: if there is nothing to score, or a function returns a wrong number of rewards, or one that is no
        finite number; names the function and the row. `RuntimeError`: if a function itself fails.
    """
    if not rollouts or not rewards:
        raise ValueError(f"Nothing to score: {len(rollouts)} rollouts, {len(rewards)} reward functions.")
    # A function's own arguments are not the data's to give.
    names = {name for rollout in rollouts for name in rollout.columns} - {"prompts", "completions"}
    columns = {name: [rollout.columns.get(name) for rollout in rollouts] for name in sorted(names)}
    prompts, completions = [r.prompt for r in rollouts], [r.completion for r in rollouts]
    scores, bad = [], []
    for function in rewards:
        name = reward_name(function)
        try:
            # Copies: a function may change what it is given, and the next one must not see that, nor the file.
            values = list(function(*copy.deepcopy((prompts, completions)), **copy.deepcopy(columns)))
        except (ImportError, MissingColumnError):
            raise  # each says what to do
        except Exception as error:
            raise RuntimeError(f"The reward {name} failed: {type(error).__name__}: {error}") from error
        if len(values) != len(rollouts):
            raise ValueError(f"The reward {name} returned {len(values)} values for {len(rollouts)} responses.")
        finite = [_finite(value) for value in values]
        bad += [
            BadRow(f"{source}, row {row}", f"the reward {name} returned {values[row]!r}, expected a finite number")
            for row, value in enumerate(finite)
            if value is None
        ]
        scores.append(finite)
    report_bad_rows(bad, on_bad_rows)
    return [
        replace(rollout, reward=None if None in values else list(values))
        for rollout, *values in zip(rollouts, *scores, strict=True)
    ]


def label_rollouts(
    folder: str | os.PathLike,
    rewards: dict[str, RewardFunction] | Sequence[RewardFunction],
    *,
    again: bool = False,
    on_bad_rows: str = "error",
    progress: Progress | None = None,
) -> dict[str, float]:
    """
    Score the rollouts of a folder, file by file, in place: each file is replaced by itself with rewards. A run that
    was stopped goes on where it was. Under `accelerate launch` the processes share the files.

    Args:
        folder (`str` or `os.PathLike`):
            A finished folder of [`write_rollouts`].
        rewards (`dict[str, RewardFunction]`, or sequence of functions):
            The rewards, one objective each, by their names.
        again (`bool`, *optional*, defaults to `False`):
            Replace the rewards of an earlier scoring. The same call goes on with a stopped one.
        on_bad_rows (`str`, *optional*, defaults to `"error"`):
            As for [`score_rollouts`].
        progress (`Callable[[int, int], None]`, *optional*):
            Called with (done, total) instead of showing a bar.

    Returns:
        Counts: those of the rollouts, `unscored`, and the sum of each reward, `reward NAME`.

    Raises:
        `ValueError`: as [`score_rollouts`]; if the rollouts have other rewards already (also those of a function of
        the same name whose source differs) and `again` is not set; if a file is damaged. `OSError`: as
        [`read_manifest`].
    """
    if not isinstance(rewards, dict):
        rewards = by_name(rewards)
    folder, names = Path(folder), list(rewards)
    wanted = {"rewards": names, "fingerprints": [reward_fingerprint(function) for function in rewards.values()]}
    known = read_manifest(folder, "rollouts", "recontrol rollout", complete=False)
    stage = StageFolder(folder, "rollouts", known["settings"], known["num_parts"], ".parquet")
    with stage:
        scorings = [scoring_of(path) for path in map(stage.part_path, range(stage.num_parts)) if path.is_file()]
        if len(scorings) < stage.num_parts:
            raise ValueError(f"The rollouts in {folder} are not finished: run the same `recontrol rollout` again.")
        scoring = known.get("scoring", 0)
        found = {name: known.get(name) for name in wanted}
        if scoring in scorings and found != wanted and not again:
            raise ValueError(_other_rewards(folder, found, wanted))
        finished = known["complete"] and known.get("rewards") is not None
        if finished and not again:
            return stage.counts()
        if found != wanted or finished:
            scoring = max((number for number in scorings if number is not None), default=-1) + 1
        stage.processes.wait()
        if stage.processes.index == 0:
            stage.write_manifest(known | {"complete": False, "scoring": scoring} | wanted)
        stage.processes.wait()
        total = sum(count_rollouts(stage.part_path(index)) for index in stage.own_parts())
        with progress_bar("rewards", total, progress, stage.processes.index) as advance:
            for index in stage.own_parts():
                path = stage.part_path(index)
                if (known["complete"] or scorings[index] is None) and file_checksum(path) != known["parts"].get(
                    path.name
                ):
                    raise ValueError(f"{path} was changed or damaged: it is not what its {MANIFEST_NAME} names.")
                rollouts = load_rollouts(path)
                if scorings[index] != scoring and rollouts:
                    scored = score_rollouts(rollouts, *rewards.values(), on_bad_rows=on_bad_rows, source=path.name)
                    save_rollouts(scored, path, names, scoring)
                advance(len(rollouts))
        return stage.finish(
            partial(_count_scored, names=names), {"bad_rows": known.get("bad_rows", 0), "scoring": scoring} | wanted
        )


def _other_rewards(folder: Path, found: dict[str, list], wanted: dict[str, list]) -> str:
    remedy = "Name another folder, or replace the rewards: `recontrol label --again` (`again=True`)."
    if found["rewards"] == wanted["rewards"]:
        return (
            f"The rollouts in {folder} were scored with {found['rewards']}, but its source or weights are others now. "
            f"{remedy}"
        )
    return (
        f"The rollouts in {folder} were scored with another reward (there {found['rewards']}, now "
        f"{wanted['rewards']}). {remedy}"
    )


def _count_scored(path: Path, names: Sequence[str]) -> dict[str, float]:
    rollouts = load_rollouts(path)
    scored = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    return {
        "rollouts": len(rollouts),
        "finished": sum(rollout.finished for rollout in rollouts),
        "tokens": sum(len(rollout.completion_ids) for rollout in rollouts),
        "unscored": len(rollouts) - len(scored),
    } | {f"reward {name}": sum(reward[k] for reward in scored) for k, name in enumerate(names)}
