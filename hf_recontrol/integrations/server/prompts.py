"""The server's prompts: token ids as every other command of the package makes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import HTTPException
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_parsing import ResponseParser

from ...data.prompts import Prompt
from ...data.templating import PromptEncoder, message_text
from ...settings import TemplateSettings
from .responses import UNREADABLE, TolerantParser, read_message


class Prompts:
    """
    What transformers' handlers call a processor: the tokenizer, but that prompts become token ids as in training.
    transformers' server takes special tokens that a message mentions as such, leaves out what it does not know of a
    message, and begins a text twice that begins with BOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._inner = tokenizer
        self._of_chats = PromptEncoder(tokenizer, TemplateSettings())
        self._of_texts = PromptEncoder(tokenizer, TemplateSettings(prompt_format="formatted"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, text: str, return_tensors: str) -> BatchEncoding:
        """A completion's prompt: it is in the model's format."""
        return _encoded(self._of_texts, text, {})

    def apply_chat_template(
        self,
        messages: list[dict],
        *,
        tools: list[dict] | None,
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
        return_tensors: str,
        load_audio_from_video: bool = False,
        **chat_template_kwargs,
    ) -> BatchEncoding:
        """A chat's prompt."""
        return _encoded(
            self._of_chats, messages, {"tools": tools or None, "chat_template_kwargs": chat_template_kwargs or None}
        )

    def parse_response(self, ids: Sequence[int], template: dict, *, prefix: str, tools: list[dict] | None) -> dict:
        """The parts of an answer, as the tokenizer finds them; where it cannot, as the answer's stream has them."""
        try:
            message = self._inner.parse_response(ids, template, prefix=prefix, tools=tools)
            if all(call["function"].keys() >= {"name", "arguments"} for call in message.get("tool_calls") or []):
                return message
        except UNREADABLE:
            pass
        parser = TolerantParser(ResponseParser(template, prefix=prefix, tools=tools), self._inner._tokenizer)
        return read_message(self._inner.decode(ids), parser)


def _encoded(encoder: PromptEncoder, prompt: Prompt, options: dict[str, Any]) -> BatchEncoding:
    try:
        ids = torch.tensor([encoder.encode({"prompt": prompt} | options)])
    except ValueError as error:
        raise HTTPException(400, f"This cannot be a prompt of the model: {error}") from error
    if (lost := encoder.take_lost()) is not None:
        raise HTTPException(400, f"This cannot be a prompt of the model: {lost}")
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


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
