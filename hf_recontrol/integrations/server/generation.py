"""How the server's answers are drawn: transformers' manager, with stop strings, seeds and room as clients expect."""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import HTTPException
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

from ...collection.sampling import StopStrings
from ..request_settings import Asked
from .responses import TolerantParser, held_back

logger = logging.get_logger(__name__)

# What may be said to a client of an error while an answer was drawn: these name a setting of the request.
TOLD = (FloatingPointError,)
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
        criteria: list[StoppingCriteria] = [] if self.gone is None else [_NobodyWaits(self.gone)]
        if self.stops:
            criteria.append(StopStrings(tokenizer, self.stops, kwargs["input_ids"].shape[-1]))
        kwargs["stopping_criteria"] = criteria
        # Here, in the thread that draws: transformers' server seeds where requests arrive, beside other answers.
        torch.manual_seed(secrets.randbits(63) if self.seed is None else self.seed)
        return self.model.generate(control=self.asked.control, value_heads=self.asked.weights, **kwargs)

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


def take_over(model: PreTrainedModel) -> list[str]:
    """
    Make a model's own generation config one under which each request gets one answer, drawn token by token and as it
    is streamed; `generate` fills a request's config from it. Returns the stop strings that it held: transformers'
    criterion for these looks at the prompt too, and cannot read every tokenizer's vocabulary.
    """
    config = copy.deepcopy(model.generation_config)
    stops = config.stop_strings or []
    for name in _OTHER_MODES:
        setattr(config, name, None)
    model.generation_config = config
    return [stops] if isinstance(stops, str) else list(stops)


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stop strings in it."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


class _Decoder:
    """tokenizers' `DecodeStream`, and what it keeps back at the end: a character of which not all bytes came."""

    def __init__(self, stream, skip_special_tokens: bool):
        self._stream, self._skip_special_tokens = stream, skip_special_tokens
        self._ids: list[int] = []
        self._said = 0

    def step(self, tokenizer, token: int) -> str | None:
        # Drafts come several at once.
        self._ids += token if isinstance(token, list) else [token]
        text = self._stream.step(tokenizer, token)
        self._said += len(text or "")
        return text

    def rest(self, tokenizer) -> str:
        return tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)[self._said :]


class _Streamer(DirectStreamer):
    """Text as it is drawn, up to a stop string: what may be the beginning of one waits for the next token."""

    def __init__(self, *args, stops: Sequence[str], **kwargs):
        self._stops, self._waiting, self._is_cut = stops, "", False
        super().__init__(*args, **kwargs)
        if self._parser is not None:
            self._parser = TolerantParser(self._parser, self._tokenizer)
        self._decode_stream = _Decoder(self._decode_stream, skip_special_tokens=self._parser is None)

    def end(self) -> None:
        """As the base class; first what waits for bytes that do not come."""
        if rest := self._decode_stream.rest(self._tokenizer):
            items = [rest] if self._parser is None else response_events_to_chunks(self._parser.feed(rest))
            for item in items:
                self._enqueue(item)
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
        streamer = _Streamer(tokenizer, loop, queue, response_parser=response_parser, stops=model.stops)

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
        text, *rest = await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        return cut_at_stops(text, model.stops), *rest


class State(GenerationState):
    """One manager for all models: they are one model under several settings."""

    def __init__(self):
        super().__init__()
        self._manager = Manager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Manager:
        """The manager."""
        return self._manager
