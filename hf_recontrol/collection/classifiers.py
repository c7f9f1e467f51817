"""Sequence classifiers as rewards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..data.fingerprints import model_fingerprint
from ..data.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    text_completions = True

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

    @property
    def fingerprint(self) -> str:
        """A hash of the weights and of which label is taken."""
        return f"{model_fingerprint(self.model)}/{self.index}"

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
