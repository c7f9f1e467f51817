"""Responses to rewards: a function with TRL's signature, a column of the data, or a sequence classifier."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .rollouts import Prompt, Rollout

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
        rewards: list[float] = []
        for start in logging.tqdm(range(0, len(prompts), self.batch_size), desc="rewards"):
            part = slice(start, start + self.batch_size)
            inputs = self._encode(prompts[part], completions[part]).to(self.model.device)
            rewards += self.model(**inputs).logits[:, self.index].float().tolist()
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


def load_reward(spec: str) -> RewardFunction:
    """
    A reward function from its description.

    Args:
        spec (`str`):
            `"module:function"` (also a module in the current folder), `"column:NAME"` for a column of the data, or the
            folder or Hub name of a sequence classifier, `"name"` or `"name#LABEL"` if it has several labels.

    Raises:
        `ValueError`, `OSError`: if there is no such thing.
    """
    if spec.startswith("column:"):
        return _column(spec.removeprefix("column:"))
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
    return ClassifierReward.from_pretrained(name, label=label or None)


def _column(name: str) -> RewardFunction:
    def reward(prompts, completions, **columns):
        if name not in columns:
            raise MissingColumnError(f"The data have no column {name!r}, they have {sorted(columns)}.")
        return columns[name]

    reward.__name__ = name
    return reward


def score_rollouts(rollouts: Sequence[Rollout], *rewards: RewardFunction) -> list[Rollout]:
    """
    Rollouts with their rewards, one for each function (one objective each).

    Raises:
        `ValueError`: if there is nothing to score, or a function returns a wrong number of rewards, or one that is no
        finite number; names the function and the row. `RuntimeError`: if a function itself fails.
    """
    if not rollouts or not rewards:
        raise ValueError(f"Nothing to score: {len(rollouts)} rollouts, {len(rewards)} reward functions.")
    names = set(rollouts[0].columns).intersection(*(rollout.columns for rollout in rollouts))
    columns = {name: [rollout.columns[name] for rollout in rollouts] for name in sorted(names)}
    prompts, completions = [r.prompt for r in rollouts], [r.completion for r in rollouts]
    scores = []
    for function in rewards:
        name = getattr(function, "__name__", type(function).__name__)
        try:
            values = list(function(prompts, completions, **columns))
        except (ImportError, MissingColumnError):
            raise  # each says what to do
        except Exception as error:
            raise RuntimeError(f"The reward {name} failed: {type(error).__name__}: {error}") from error
        if len(values) != len(rollouts):
            raise ValueError(f"The reward {name} returned {len(values)} values for {len(rollouts)} responses.")
        for row, value in enumerate(values):
            value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"The reward {name} returned {value!r} for row {row}: expected a finite number.")
            values[row] = float(value)
        scores.append(values)
    return [replace(rollout, reward=list(values)) for rollout, *values in zip(rollouts, *scores, strict=True)]
