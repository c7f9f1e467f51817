"""Answers of bases that mark thoughts and tool calls: transformers' response parsers, for whatever a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks
from transformers.utils.chat_parsing import ResponseParser

# What is raised at a tool call that is none, or is cut by the answer's end.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def _items(events: list[dict[str, Any]]) -> list[str | ToolCall]:
    """What events tell a client; `TypeError` for a call that names no function."""
    items = response_events_to_chunks(events)
    if any(isinstance(item, ToolCall) and not isinstance(item.name, str) for item in items):
        raise TypeError("A tool call's name is no text.")
    return items


def held_back(text: str, marks: Sequence[str]) -> int:
    """How many of a text's last characters may be the beginning of one of the marks."""
    lengths = range(min(len(text), max(map(len, marks), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(mark.startswith(text[-n:]) for mark in marks)), 0)


class TolerantParser:
    """
    A response parser for what a model may write: a tool call that cannot be read is text of the answer, and so is all
    behind it. With transformers' alone the request would fail.

    Args:
        parser (`ResponseParser`):
            Fresh.
        tokenizer (`tokenizers.Tokenizer`):
            Whose special tokens are left out of what was not read.
    """

    def __init__(self, parser: ResponseParser, tokenizer: Tokenizer):
        self._parser = parser
        self._special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        # What was fed and is in no event yet, and whether a tool call could not be read.
        self._waiting, self._has_failed = "", False
        self.initial_events = parser.initial_events

    def feed(self, text: str) -> list[dict[str, Any]]:
        """As the parser's; the events do not depend on how a text is cut into pieces."""
        return [event for character in text for event in self._feed(character)]

    def _feed(self, character: str) -> list[dict[str, Any]]:
        self._waiting += character
        if self._has_failed:
            return self._as_text()
        try:
            events = self._parser.feed(character)
            _items(events)
        except _UNREADABLE:
            return self._as_text()
        for event in events:
            if event["type"] == "region_chunk" and not event.get("dirty"):
                self._waiting = self._waiting[len(event["text"]) :]
            # The answer's text also ends where a tool call begins, whose mark waits.
            elif event["type"] == "region_close" and event.get("field") != "content":
                self._waiting = ""
        return events

    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """As the parser's."""
        if self._has_failed:
            return {}, [{"type": "region_chunk", "field": "content", "text": self._waiting}]
        try:
            message, events = self._parser.finalize()
            _items(events)
        except _UNREADABLE:
            events = self._as_text()
            return {}, [*events, {"type": "region_chunk", "field": "content", "text": self._waiting}]
        return message, events

    def _as_text(self) -> list[dict[str, Any]]:
        self._has_failed = True
        text = self._waiting
        for token in self._special:
            text = text.replace(token, "")
        # What may become a special token waits for its end.
        held = held_back(text, self._special)
        self._waiting = text[len(text) - held :]
        text = text[: len(text) - held]
        return [{"type": "region_chunk", "field": "content", "text": text}]


def read_message(text: str, parser: TolerantParser) -> dict[str, Any]:
    """A whole answer, special tokens spelled out, as its stream would have it."""
    events = [*parser.initial_events, *parser.feed(text), *parser.finalize()[1]]
    items = _items(events)
    calls = [item for item in items if isinstance(item, ToolCall)]
    return {
        "content": "".join(item for item in items if type(item) is str),
        "reasoning_content": "".join(item for item in items if isinstance(item, ReasoningText)) or None,
        "tool_calls": [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls],
    }
