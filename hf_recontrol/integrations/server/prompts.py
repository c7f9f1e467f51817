"""The server's prompts: token ids as every other command of the package makes them."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import HTTPException
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.chat_parsing import ResponseParser

from ...collection.sampling import check_embedded
from ...data.templating import PromptEncoder, message_text
from ...settings import TemplateSettings
from .responses import TolerantParser, read_message


class Prompts:
    """
    Makes token ids of requests' prompts as in training, in any thread. transformers' server takes special tokens that
    a message mentions as such, leaves out what it does not know of a message, and begins a text twice that begins with
    BOS.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._model, self._own = model, tokenizer
        self._of_chats = PromptEncoder(tokenizer, TemplateSettings())
        self._of_texts = PromptEncoder(tokenizer, TemplateSettings(prompt_format="formatted"))
        # An encoder's notes are of one prompt.
        self._turn = threading.Lock()

    def of_text(self, text: str) -> Encoded:
        """A completion's prompt: it is in the model's format."""
        return self._encoded(self._of_texts, {"prompt": text})

    def of_chat(self, messages: list[dict], tools: list[dict] | None, arguments: dict[str, Any] | None) -> Encoded:
        """A chat's prompt, with `arguments` of the template."""
        row = {"prompt": chat_messages(messages), "tools": tools or None, "chat_template_kwargs": arguments or None}
        return self._encoded(self._of_chats, row)

    def _encoded(self, encoder: PromptEncoder, row: dict[str, Any]) -> Encoded:
        with self._turn:
            try:
                ids = encoder.encode(row)
                check_embedded(self._model, self._own, ids)
            except ValueError as error:
                raise _no_prompt(error) from error
            finally:
                lost = encoder.take_lost()
        if lost is not None:
            raise _no_prompt(lost)
        ids = torch.tensor([ids])
        return Encoded(self._own, BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}))


def _no_prompt(why: Any) -> HTTPException:
    return HTTPException(400, f"This cannot be a prompt of the model: {why}")


class Encoded:
    """What transformers' handlers call a processor: the tokenizer, but that a request's prompt is encoded already."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding):
        self._inner, self._inputs = tokenizer, inputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args, **kwargs) -> BatchEncoding:
        return self._inputs

    def apply_chat_template(self, *args, **kwargs) -> BatchEncoding:
        """The prompt."""
        return self._inputs

    def parse_response(self, ids: Sequence[int], template: dict, *, prefix: str, tools: list[dict] | None) -> dict:
        """The parts of an answer, as its stream has them."""
        parser = TolerantParser(ResponseParser(template, prefix=prefix, tools=tools), self._inner._tokenizer)
        return read_message(self._inner.decode(ids), parser)


def chat_messages(messages: list[dict]) -> list[dict]:
    """Messages of a request as templates read them: contents as texts, arguments of calls as objects."""
    return [
        message | {"content": message_text(message)} | ({"tool_calls": calls} if calls else {"tool_calls": None})
        for message in messages
        for calls in [[_call(call) for call in message.get("tool_calls") or []]]
    ]


def _call(call: dict) -> dict:
    arguments = call["function"].get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return call | {"function": call["function"] | {"arguments": arguments}}
