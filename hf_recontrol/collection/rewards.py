"""Rewards: functions, columns of the data, sequence classifiers."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..data.fingerprints import model_fingerprint
from ..data.processes import Processes
from ..data.prompts import Prompt
from ..utils.extras import needs_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# f(prompts, completions, **columns) -> list[float], called by position: one reward for each prompt and completion.
# Further columns of the data come as keyword arguments, lists of the same length.
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
        # Seconds to import, which other rewards do not need.
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

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
    with needs_extra("demo", "The VADER reward"):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
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
    try:
        reward = ClassifierReward.from_pretrained(name, label=label or None)
    except OSError as error:
        raise OSError(
            f"The reward {spec!r} is no column of the data ({sorted(columns)}) and no `module:function`, and no "
            f"classifier of that name could be loaded: {error}"
        ) from error
    reward.model.to(Processes().device)
    return reward


def reward_column(spec: str, columns: Collection[str]) -> str | None:
    """The column that a reward's description names, or `None` if it names something else."""
    if spec in columns:
        return spec
    return spec.removeprefix("column:") if spec.startswith("column:") else None


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
