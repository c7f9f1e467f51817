"""Sequence classifiers as rewards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ...data.prompts import Prompt
from ...data.templating import message_text, prompt_text, rendered
from ...utils.code_fingerprints import model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

# Tokenizers without a limit say that they have one far above this.
_NO_LIMIT = 10**9

# What says where a tokenizer comes from too.
_OF_BOTH = ("token", "revision", "cache_dir", "subfolder", "trust_remote_code", "local_files_only", "force_download")

# How much of a score rounding may be, in float32 (and float64), and in the shorter dtypes.
_ROUNDING, _COARSE_ROUNDING = 1e-4, 5e-2


class ClassifierReward:
    """
    The score of a sequence-classification model, as a reward function.

    Args:
        model ([`~transformers.PreTrainedModel`]), tokenizer:
            A classifier with one label (a reward model), or with several and a `label` to take.
        label (`str`, *optional*):
            The label whose logit is the reward, by its name in `config.id2label`.
        batch_size (`int`, *optional*, defaults to 32):
            Texts scored at once; one at a time if the model's configuration has no padding token.

    What is scored: with a chat template, prompt and response as a chat. Without one, a pair of texts where the
    tokenizer puts a separator between them (BERT and its kind); else prompt, response and the end token as one text,
    which is what TRL's `RewardTrainer` trains on. A text that is longer than the model can read loses its beginning,
    never its response's end; a warning counts those. In place of the number of a chat that the template refuses stands
    the error that says why.

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
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        labels = model.config.id2label
        if label is None and len(labels) > 1:
            raise ValueError(
                f"{name} has several labels, {list(labels.values())}: choose one, `{name}#LABEL` (in Python `label=`)."
            )
        if label is not None and label not in labels.values():
            raise ValueError(f"{name} has no label {label!r}, it has {list(labels.values())}.")
        self.index = 0 if label is None else {value: index for index, value in labels.items()}[label]
        self.__name__ = f"{name}#{label}" if len(labels) > 1 else name
        self.model, self.tokenizer = model.eval(), tokenizer
        # The model looks for its own padding token, whatever the tokenizer's is.
        config = model.config.get_text_config()
        self.pad_id = config.pad_token_id
        can_pad = self.pad_id is not None and 0 <= self.pad_id < config.vocab_size
        self.batch_size = batch_size if can_pad else 1
        self.longest = _longest(model, tokenizer)
        specials = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
        self.takes_pairs = tokenizer.sep_token is not None and specials[1] > specials[0]
        if self.batch_size > 1 and self._reads_padding():
            self.batch_size = 1

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, label: str | None = None, **kwargs) -> ClassifierReward:
        """
        Load classifier and tokenizer from a folder or the Hub.

        Args:
            name_or_path (`str` or `os.PathLike`):
                The folder or Hub name.
            label (`str`, *optional*):
                As for the class.
            kwargs:
                As for the model's `from_pretrained`.

        Raises:
            `ValueError`: if it is no sequence classifier, or its files lack some of the weights. `OSError`: if there
            is no such model.
        """
        # Seconds to import, which other rewards do not need.
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        shared = {key: kwargs[key] for key in _OF_BOTH if key in kwargs}
        if _is_adapter(name_or_path):
            raise ValueError(
                f"{name_or_path} is an adapter: merge it into its base (PEFT's `merge_and_unload`), save that with "
                "its tokenizer, and name that folder."
            )
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name_or_path, **kwargs | {"output_loading_info": True}
            )
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name_or_path} is no sequence classifier: {error}") from error
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{name_or_path} is no sequence classifier, or not a whole one (its configuration says "
                f"{model.config.architectures}): its files lack {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}, which would be random."
            )
        return cls(model, AutoTokenizer.from_pretrained(name_or_path, **shared), label=label)

    @property
    def fingerprint(self) -> str:
        """A hash of the weights, of which label is taken, and of the tokenizer with its chat template."""
        tokenizer = self.tokenizer
        held = [tokenizer.chat_template, sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map]
        text = repr([*held, self.longest, self.pad_id])
        return f"{model_fingerprint(self.model)}/{self.index}/{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @torch.no_grad()
    def _reads_padding(self) -> bool:
        """Whether a score depends on the padding beside a text, as in XLNet and FNet; found by scoring two texts."""
        try:
            texts = [self.encode("Hello.", "Good. " * count)[0] for count in (1, 6)]
            alone = torch.cat([self.model(**self._batch([text])).logits.float() for text in texts])
            together = self.model(**self._batch(texts)).logits.float()
        except Exception:  # what cannot be scored is told where rewards are tried
            return False
        rounding = _ROUNDING if self.model.dtype in (torch.float32, torch.float64) else _COARSE_ROUNDING
        return not (alone - together).abs().max() <= rounding * (1 + alone.abs().max())

    def encode(self, prompt: Prompt, completion: str) -> tuple[dict[str, list[int]], bool]:
        """
        The model's inputs for one response.

        Returns:
            `tuple` of the inputs by name, and whether the beginning was left out.

        Raises:
            `ValueError`: if the chat template refuses the chat.
        """
        tokenizer = self.tokenizer
        if tokenizer.chat_template is not None:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            chat.append({"role": "assistant", "content": completion})
            try:
                chat = [self._as_the_template_reads(message) for message in chat]
                inputs = rendered(tokenizer, chat, tokenizer_kwargs={"verbose": False})
            except Exception as error:  # whatever a template raises
                raise ValueError(f"the chat template of {self.__name__} refuses this chat: {error}") from error
            added = [0] * len(inputs["input_ids"])
        else:
            options = {"return_special_tokens_mask": True, "verbose": False}
            text = prompt_text(prompt)
            if self.takes_pairs:
                encoded = tokenizer(text, completion, **options)
            else:
                between = "" if isinstance(prompt, str) else "\n\n"
                encoded = tokenizer(f"{text}{between}{completion}{tokenizer.eos_token or ''}", **options)
            inputs = dict(encoded)
            added = inputs.pop("special_tokens_mask")
        ids = inputs["input_ids"]
        if self.longest is None or len(ids) <= self.longest:
            return inputs, False
        # What the tokenizer adds stays where it is.
        fixed = [i for i, is_added in enumerate(added) if is_added or (i == 0 and ids[0] == tokenizer.bos_token_id)]
        others = sorted(set(range(len(ids))) - set(fixed))
        kept = sorted(fixed + others[len(ids) - self.longest :])
        return {name: [values[i] for i in kept] for name, values in inputs.items()}, True

    @cached_property
    def _reads(self) -> tuple[bool, bool]:
        """Whether the chat template writes contents that are texts, and those in parts; without a word otherwise."""
        found = []
        for content in ("Hello?", [{"type": "text", "text": "Hello?"}]):
            chat = [{"role": role, "content": content} for role in ("user", "assistant")]
            try:
                text = self.tokenizer.apply_chat_template(chat, tokenize=False)
            except Exception:  # whatever a template raises
                text = ""
            found.append(text.count("Hello?") == 2 and "'text'" not in text)
        return found[0], found[1]

    def _as_the_template_reads(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose content is a text or in parts, whichever the template writes."""
        content, (texts, parts) = message.get("content"), self._reads
        if isinstance(content, str) and parts and not texts:
            return message | {"content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and texts and not parts:
            if any(part.get("text") is None for part in content):
                raise ValueError("it writes texts alone, and the content of a message holds something else")
            return message | {"content": message_text(message)}
        return message

    def _batch(self, encoded: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        # On the right, so that position embeddings do not depend on the batch.
        return {
            name: pad_sequence(
                [torch.tensor(inputs[name]) for inputs in encoded],
                batch_first=True,
                padding_value=self.pad_id or 0 if name == "input_ids" else 0,
            ).to(self.model.device)
            for name in encoded[0]
        }

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **kwargs) -> list[float | ValueError]:
        rewards: list[Any] = [None] * len(prompts)
        encoded, cut = {}, 0
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                encoded[i], was_cut = self.encode(prompt, completion)
                cut += was_cut
            except ValueError as error:
                rewards[i] = error
        # By length, so that little is spent on padding.
        order = sorted(encoded, key=lambda i: len(encoded[i]["input_ids"]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            logits = self.model(**self._batch([encoded[i] for i in chosen])).logits[:, self.index]
            for i, value in zip(chosen, logits.float().tolist(), strict=True):
                rewards[i] = value
        if cut:
            logger.warning(
                f"{cut} of {len(prompts)} texts are longer than the {self.longest} tokens that {self.__name__} reads: "
                "their beginning was left out."
            )
        return rewards


def _is_adapter(folder: str | os.PathLike) -> bool:
    names = ("adapter_config.json", "config.json")
    return [os.path.isfile(os.path.join(folder, name)) for name in names] == [True, False]


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens a model can read, or `None` where nothing says so."""
    limits = [tokenizer.model_max_length]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions > 0:
        # RoBERTa and its kind count positions from behind the padding token's id.
        first = [
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        ]
        limits.append(positions - max(first, default=0))
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)
