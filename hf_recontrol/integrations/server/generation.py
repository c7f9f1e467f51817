"""How the server's answers are drawn: transformers' manager, with stop strings, seeds and room as clients expect."""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastapi import HTTPException
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
    _StreamError,
    response_events_to_chunks,
)
from transformers.utils import logging

from ...collection.sampling import end_token_ids, listed_ids
from ...collection.stop_strings import StopStrings
from ...control.guards import NoTokenLeftError
from ..request_settings import Asked
from .responses import TolerantParser, held_back

logger = logging.get_logger(__name__)

# What may be said to a client of an error while an answer was drawn: these name a setting of the request.
TOLD = (FloatingPointError, NoTokenLeftError)
# What makes `generate` search, return several answers or something else than tokens, or stop in a way of its own.
_OTHER_MODES = (
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "stop_strings",
)
INTERNAL = "The server failed at this request. Its log says why."


@dataclass
class RequestModel:
    """The served model as one request sees it: what transformers' handlers call `model`."""

    model: PreTrainedModel
    asked: Asked
    seed: int | None = None
    stops: Sequence[str] = ()
    # Whether the client named the length; else it is cut to the room there is.
    length_is_asked: bool = False
    # Set when nobody waits for the answer any more.
    gone: threading.Event | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, tokenizer: PreTrainedTokenizerBase, **kwargs) -> torch.Tensor:
        """Draw an answer under the request's control. Without a seed of the request each answer has a new one."""
        if self.gone is not None and self.gone.is_set():
            if (streamer := kwargs.get("streamer")) is not None:
                streamer.end()
            return kwargs["input_ids"]
        criteria: list[StoppingCriteria] = [] if self.gone is None else [_NobodyWaits(self.gone)]
        if self.stops:
            criteria.append(StopStrings(tokenizer, self.stops, kwargs["input_ids"].shape[-1]))
        kwargs["stopping_criteria"] = criteria
        # Here, in the thread that draws: transformers' server seeds where requests arrive, beside other answers.
        torch.manual_seed(secrets.randbits(63) if self.seed is None else self.seed)
        return self.model.generate(control=self.asked.control, value_heads=self.asked.weights, **kwargs)

    def note_end(self, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, drawn: Sequence[int]) -> None:
        """
        Make room behind an answer that ended by itself: transformers' handlers say that one was cut which is as long
        as its config allows.
        """
        text = tokenizer.decode(drawn) if self.stops else ""
        if set(drawn[-1:]) & set(listed_ids(config.eos_token_id)) or any(stop in text for stop in self.stops):
            config.max_new_tokens = len(drawn) + 1

    def fit(self, config: GenerationConfig, length: int) -> None:
        """Cut an answer's length to the room behind a prompt of `length` tokens; 400 if a longer one was asked for."""
        room = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        asked = config.max_new_tokens
        if room is None:
            return
        if length >= room or (self.length_is_asked and length + asked > room):
            raise HTTPException(
                400,
                f"This model's context holds {room} tokens; the prompt has {length}, the answer may have {asked}.",
            )
        config.max_new_tokens = min(asked, room - length)


class _NobodyWaits(StoppingCriteria):
    """Ends an answer whose client has gone."""

    def __init__(self, gone: threading.Event):
        self._gone = gone

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self._gone.is_set(), device=input_ids.device)


def take_over(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    Make a model's own generation config one under which each request gets one answer, drawn token by token and as it
    is streamed, up to an end; `generate` fills a request's config from it. Returns the stop strings that it held:
    transformers' criterion for these looks at the prompt too, and cannot read every tokenizer's vocabulary.
    """
    config = copy.deepcopy(model.generation_config)
    stops = config.stop_strings or []
    for name in _OTHER_MODES:
        setattr(config, name, None)
    config.eos_token_id = end_token_ids(model, tokenizer) or None
    model.generation_config = config
    return [stops] if isinstance(stops, str) else list(stops)


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stop strings in it."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


class _Decoder:
    """tokenizers' `DecodeStream`, for whatever bytes a model draws."""

    def __init__(self, skip_special_tokens: bool):
        self._skip_special_tokens = skip_special_tokens
        self._begin()

    def _begin(self) -> None:
        self._stream = DecodeStream([], skip_special_tokens=self._skip_special_tokens)
        # Tokens whose text has not come yet: of a character not all bytes have.
        self._waiting: list[int] = []
        self._has_said = False

    def step(self, tokenizer: Tokenizer, token: int) -> str | None:
        """The text that a token completes, if any."""
        self._waiting.append(token)
        try:
            text = self._stream.step(tokenizer, token)
        except Exception:  # tokenizers has no other kind
            if not self._has_said:
                raise
            # Bytes that make no character take those before them along: what was said of these would not be said now.
            waiting = self._waiting
            self._begin()
            return "".join(self.step(tokenizer, each) or "" for each in waiting) or None
        if text is not None:
            self._waiting, self._has_said = [], True
        return text

    def rest(self, tokenizer: Tokenizer) -> str:
        """At the end: what is left of a character of which not all bytes came."""
        return tokenizer.decode(self._waiting, skip_special_tokens=self._skip_special_tokens)


class _Streamer(DirectStreamer):
    """Text as it is drawn, up to a stop string: what may be the beginning of one waits for the next token."""

    def __init__(self, *args, stops: Sequence[str], at_end: Callable[[list[int]], None], **kwargs):
        self._stops, self._waiting, self._is_cut = stops, "", False
        # Told of all tokens.
        self._at_end, self._drawn = at_end, []
        super().__init__(*args, **kwargs)
        if self._parser is not None:
            self._parser = TolerantParser(self._parser, self._tokenizer)
        self._decode_stream = _Decoder(skip_special_tokens=self._parser is None)

    def put(self, value: torch.Tensor) -> None:
        """As the base class; also for drafts, which come several at once, as a row."""
        if not self._first:
            self._drawn += value.flatten().tolist()
        super().put(value.flatten())

    def end(self) -> None:
        """As the base class; first what waits for bytes that do not come."""
        if rest := self._decode_stream.rest(self._tokenizer):
            items = [rest] if self._parser is None else response_events_to_chunks(self._parser.feed(rest))
            for item in items:
                self._enqueue(item)
        self._at_end(self._drawn)
        super().end()

    def _enqueue(self, item) -> None:
        if type(item) is not str or not self._stops:
            if self._waiting and not self._is_cut:
                super()._enqueue(self._waiting)
            self._waiting = ""
            super()._enqueue(item)
            return
        if self._is_cut:
            return
        text = self._waiting + item
        kept = cut_at_stops(text, self._stops)
        self._is_cut = len(kept) < len(text)
        held = 0 if self._is_cut else held_back(kept, self._stops)
        ready, self._waiting = kept[: len(kept) - held], kept[len(kept) - held :]
        if ready:
            super()._enqueue(ready)


class Manager(GenerateManager):
    """transformers' sequential manager: one answer at a time, in a thread of its own."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        """As the base class; what is wrong with the request is told before the stream begins."""
        model.fit(gen_config, inputs["input_ids"].shape[-1])
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        at_end = partial(model.note_end, gen_config, processor)
        streamer = _Streamer(tokenizer, loop, queue, response_parser=response_parser, stops=model.stops, at_end=at_end)

        def run() -> None:
            try:
                model.generate(**inputs, streamer=streamer, generation_config=gen_config, tokenizer=processor)
            except _GenerationCancelled:
                loop.call_soon_threadsafe(queue.put_nowait, None)
            except Exception as error:
                if not isinstance(error, TOLD):
                    logger.exception("A request failed.")
                # It is put between quotes in JSON as it is.
                told = json.dumps(str(error) if isinstance(error, TOLD) else INTERNAL)[1:-1]
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(told))

        self.submit(run)
        return queue, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """As the base class; the text ends before a stop string."""
        model.fit(gen_config, inputs["input_ids"].shape[-1])
        text, length, drawn = await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        model.note_end(gen_config, processor, drawn.tolist())
        return cut_at_stops(text, model.stops), length, drawn


class State(GenerationState):
    """One manager for all models: they are one model under several settings."""

    def __init__(self):
        super().__init__()
        self._manager = Manager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Manager:
        """The manager."""
        return self._manager
