"""A chat model of transformers as a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...collection.batches import pad_batch
from ...data.fingerprints import tokenizer_settings
from ...data.processes import device_of
from ...data.templating import rendered
from ...heads.base_model import load_base_model
from ...utils.checks import check_choice, check_int, check_text
from ...utils.code_fingerprints import model_fingerprint
from .language import LanguageJudge, Reply

_THINK = "<think>"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class LocalJudge(LanguageJudge):
    """
    A chat model of transformers, which replies greedily.

    Args:
        model (`str`):
            A folder or Hub name.
        revision (`str`, *optional*):
            Branch, tag or commit of its repo.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"auto"` (that of its weights), `"float32"`, `"bfloat16"` or `"float16"`.
        device (`str`, *optional*):
            Where it computes. By default this process's accelerator, if it has one.
        batch_size (`int`, *optional*, defaults to 8):
            Questions at once.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run code that comes with the model.
    """

    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int = 8
    trust_remote_code: bool = False

    asked: ClassVar[tuple[str, ...]] = (*LanguageJudge.asked, "revision", "dtype")

    def __post_init__(self):
        super().__post_init__()
        for name in ("revision", "device"):
            if getattr(self, name) is not None:
                check_text(f"judge.{name}", getattr(self, name))
        if self.device is not None:
            device_of(self.device, "judge.device")
        check_choice("judge.dtype", self.dtype, _DTYPES)
        check_int("judge.batch_size", self.batch_size, low=1)
        check_choice("judge.trust_remote_code", self.trust_remote_code, (True, False))

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """
        The model and its tokenizer.

        Raises:
            `OSError`, `ValueError`: as [`load_base_model`]; if it has no chat template.
        """
        source: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        source |= {} if self.revision is None else {"revision": self.revision}
        model = load_base_model(self.model, dtype=self.dtype, **source)
        tokenizer = AutoTokenizer.from_pretrained(self.model, **source)
        if not tokenizer.chat_template:
            raise ValueError(f"The judge {self.model} has no chat template: name a chat model.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # What a model draws with by its own default, such as a penalty on the numbers of the question, is no verdict.
        ends = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id if ends is None else ends)
        return model.to(device_of(self.device, "judge.device")).eval(), tokenizer

    def depends_on(self) -> dict[str, Any]:
        model, tokenizer = self.loaded
        own = {"weights": model_fingerprint(model), "decoding": "greedy", **tokenizer_settings(tokenizer)}
        return super().depends_on() | own

    @torch.no_grad()
    def replies(self, talks: Sequence[list[dict[str, str]]]) -> list[Reply]:
        model, tokenizer = self.loaded
        # Marks of a turn in an answer are text.
        asked = [rendered(tokenizer, talk, add_generation_prompt=True)["input_ids"] for talk in talks]
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        lengths = [len(ids) for ids in asked]
        fits = [limit is None or length + self.max_tokens <= limit for length in lengths]
        replies = [Reply(None, input_tokens=length) for length in lengths]
        places = [place for place, fit in enumerate(fits) if fit]
        if not places:
            return replies
        rows = pad_batch([asked[place] for place in places], tokenizer.pad_token_id, "left", model.device)
        # Some chat templates begin the thoughts.
        first = tokenizer.apply_chat_template(talks[0], add_generation_prompt=True, tokenize=False)
        begun = _THINK if first.rstrip().endswith(_THINK) else ""
        drawn = model.generate(
            **rows,
            do_sample=False,
            max_new_tokens=self.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )[:, rows["input_ids"].shape[1] :].cpu()
        for place, ids in zip(places, drawn, strict=True):
            text = begun + tokenizer.decode(ids, skip_special_tokens=True)
            written = int((ids != tokenizer.pad_token_id).sum())
            replies[place] = Reply(text, input_tokens=lengths[place], output_tokens=written)
        return replies
