"""
The requests of the server: transformers' handlers, with the fields of control, and strict where those are lenient.

transformers' server ignores fields that it does not support, samples only where the base's own settings say so, and
turns `frequency_penalty` into a penalty of another kind. Here an answer is what the request asked for, or the request
is refused.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import Modality
from transformers.utils import logging

from ...data.templating import mentions, unknown_arguments
from ..request_settings import FIELDS, RequestSettings, UnknownModel
from .gate import GONE, error_response
from .generation import INTERNAL, TOLD, RequestModel, cut_at_stops
from .prompts import Encoded, Prompts

logger = logging.get_logger(__name__)

# Fields that ask for nothing at these values, and are not supported at others.
_ONLY = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "prompt_logprobs": (None, 0),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "tool_choice": (None, "auto"),
    "parallel_tool_calls": (None, True),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
}
# Fields that say nothing of the answer.
_INDIFFERENT = ("user", "metadata", "store", "service_tier", "stream_options", "safety_identifier", "prompt_cache_key")
# (low, high) of numbers.
_NUMBERS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
    "top_k": (-1, 2**31),
    "seed": (-(2**63), 2**63 - 1),
    "max_tokens": (1, 2**31),
    "max_completion_tokens": (1, 2**31),
}
_INTEGERS = ("top_k", "seed", "max_tokens", "max_completion_tokens")
_MOST_STOPS, _LONGEST_STOP = 16, 1000
# Logits divided by less leave float32, and a draw from what is left ends the process on some devices.
_LOWEST_TEMPERATURE = 1e-9
# Where a request names no length: as the two endpoints of others do, as long as there is room for a chat.
_CHAT_LENGTH, _COMPLETION_LENGTH = 1024, 16


def _refuse(message: str) -> None:
    raise HTTPException(400, message)


class _Strict:
    """What both handlers do before and after transformers' own."""

    _takes: tuple[str, ...] = ()
    _length = _CHAT_LENGTH

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: RequestSettings,
        state,
        stops: Sequence[str] = (),
    ):
        super().__init__(None, state)
        self.served, self.tokenizer, self.settings = model, tokenizer, settings
        # Those of the base's own, where a request names none.
        self.stops, self.prompts = stops, Prompts(model, tokenizer)
        self.model_manager = self
        # Of one request.
        self.view: RequestModel | None = None
        self.encoded: Encoded | None = None

    @staticmethod
    def get_model_modality(model: RequestModel, processor: PreTrainedTokenizerBase) -> Modality:
        """What transformers' handlers ask of a model manager."""
        return Modality.LLM

    async def handle_request(self, body: dict, request_id: str):
        """Answer a request, or refuse it with 400 (404: no such model) and words; 500 where the server is at fault."""
        try:
            return await self._answer(body, request_id)
        except (HTTPException, *TOLD):
            raise
        except Exception:
            # Beyond this place the connection would be closed, behind an answer that says it stays.
            logger.exception("A request failed.")
            return error_response(500, INTERNAL)

    async def _answer(self, body: dict, request_id: str):
        _check_texts(body)
        # A handler of its own for each request, as transformers' methods take no settings of ours along.
        own = copy.copy(self)
        own.model_manager = own
        own.view = own.read(body)
        # A long prompt takes seconds, in which others' answers go on.
        own.encoded = await asyncio.to_thread(own.encode, body)
        answer = await super(_Strict, own).handle_request(own.cleaned(body), request_id)
        if isinstance(answer, StreamingResponse):
            answer.body_iterator = _with_end(answer.body_iterator)
        return answer

    def read(self, body: dict) -> RequestModel:
        """Check a request's fields; the model as it wants it."""
        known = {*self._takes, *_ONLY, *_INDIFFERENT, *_NUMBERS, *FIELDS, "model", "stream", "stop", "vllm_xargs"}
        if unknown := sorted(name for name in set(body) - known if body[name] is not None):
            _refuse(f"Unknown fields {unknown}. There are: {', '.join(sorted(known - _ONLY.keys()))}.")
        for name, allowed in _ONLY.items():
            value = body.get(name)
            if not any(type(value) is type(other) and value == other for other in allowed):
                _refuse(f"`{name}` is not supported here, got {value!r}.")
        for name, (low, high) in _NUMBERS.items():
            _check_number(name, body.get(name), low, high)
        if 0 < (body.get("temperature") or 0) < _LOWEST_TEMPERATURE:
            _refuse(f"`temperature` must be 0, or at least {_LOWEST_TEMPERATURE:g}, got {body['temperature']!r}.")
        if not isinstance(body.get("stream", False), (bool, type(None))):
            _refuse("`stream` must be true or false.")
        try:
            asked = self.settings.read(body.get("model"), self._control_fields(body))
            # With all heads at hand also what only these can tell.
            with self.served.use_control(asked.control, asked.weights):
                pass
        except UnknownModel as error:
            raise HTTPException(404, str(error)) from error
        except (ValueError, TypeError) as error:
            _refuse(str(error))
        named = any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))
        stops = _stops(body.get("stop")) or self.stops
        return RequestModel(self.served, asked, body.get("seed"), stops, named, GONE.get())

    def _control_fields(self, body: dict) -> dict[str, Any]:
        """The fields of control: at the top, or where vLLM has them."""
        extra = {} if body.get("vllm_xargs") is None else body["vllm_xargs"]
        if not isinstance(extra, dict):
            raise ValueError("`vllm_xargs` must be an object.")
        if twice := sorted(extra.keys() & body.keys() & set(FIELDS)):
            raise ValueError(f"{twice} stand both in the body and in `vllm_xargs`: name them once.")
        return extra | {name: body[name] for name in FIELDS if name in body}

    def encode(self, body: dict) -> Encoded:
        """The request's prompt."""
        raise NotImplementedError

    def cleaned(self, body: dict) -> dict[str, Any]:
        """The fields that transformers' handler is to see."""
        kept = {*self._takes, "model", "stream", "temperature", "top_p"}
        return {name: value for name, value in body.items() if name in kept and value is not None} | {"_asked": body}

    def _validate_request(self, body: dict) -> None:
        pass

    def _resolve_model(self, body: dict):
        return body.get("model") or self.settings.base, self.view, self.encoded

    def _build_generation_config(
        self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        asked = body["_asked"]
        own = {name: value for name, value in body.items() if name != "_asked"}
        config = super()._build_generation_config(own, model_generation_config, use_cb=use_cb)
        temperature = asked.get("temperature")
        if temperature is None:
            temperature = model_generation_config.temperature
        config.do_sample = temperature != 0
        if config.do_sample:
            config.temperature = 1.0 if temperature is None else float(temperature)
            # No filter that nobody asked for.
            top_k = asked.get("top_k")
            config.top_k = max(top_k, 0) if top_k is not None else model_generation_config.top_k or 0
        else:
            config.temperature = config.top_p = config.top_k = config.min_p = None
        for name in ("min_p", "repetition_penalty"):
            if asked.get(name) is not None and (config.do_sample or name != "min_p"):
                setattr(config, name, float(asked[name]))
        length = asked.get("max_completion_tokens") or asked.get("max_tokens")
        config.max_new_tokens = length or self._length
        config.max_length = None
        return config


class Chat(_Strict, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    _takes = ("messages", "tools", "chat_template_kwargs")

    def read(self, body: dict) -> RequestModel:
        view = super().read(body)
        if not self.tokenizer.chat_template:
            _refuse("This base has no chat template: use /v1/completions.")
        _check_messages(body.get("messages"))
        tools = body.get("tools") if body.get("tools") is not None else []
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            _refuse("`tools` must be a list of objects.")
        more = {} if body.get("chat_template_kwargs") is None else body["chat_template_kwargs"]
        if not isinstance(more, dict):
            _refuse("`chat_template_kwargs` must be an object.")
        try:
            unknown = unknown_arguments(self.tokenizer, more)
        except ValueError as error:
            _refuse(str(error))
        if unknown:
            _refuse(f"`chat_template_kwargs`: this base's chat template knows no {unknown[0]!r}.")
        if tools and not mentions(self.tokenizer.get_chat_template(tools=tools), "tools"):
            _refuse("This base's chat template knows no `tools`: say what there is in a message.")
        return view

    def encode(self, body: dict) -> Encoded:
        return self.prompts.of_chat(body["messages"], body.get("tools"), body.get("chat_template_kwargs"))

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        """Messages that were encoded already, so that they are read no more."""
        return messages

    def _build_completion(self, request_id: str, content: str, *args, **kwargs) -> dict:
        # A response template reads the tokens, beyond a stop string too.
        return super()._build_completion(request_id, cut_at_stops(content or "", self.view.stops), *args, **kwargs)


class Completion(_Strict, CompletionHandler):
    """`/v1/completions`."""

    _takes = ("prompt",)
    _length = _COMPLETION_LENGTH

    def read(self, body: dict) -> RequestModel:
        if not isinstance(self._prompt(body), str):
            _refuse("`prompt` must be one text.")
        return super().read(body)

    @staticmethod
    def _prompt(body: dict) -> Any:
        prompt = body.get("prompt")
        return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt

    def encode(self, body: dict) -> Encoded:
        return self.prompts.of_text(self._prompt(body))

    def cleaned(self, body: dict) -> dict[str, Any]:
        return super().cleaned(body) | {"prompt": self._prompt(body)}


async def _with_end(parts: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """A stream, and what clients of OpenAI's API wait for behind it."""
    async with aclosing(parts):
        async for part in parts:
            yield part
    yield "data: [DONE]\n\n"


def _check_texts(body: dict) -> None:
    """Refuse what JSON can write and no tokenizer or template can read."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _refuse("A text holds half a surrogate pair (\\ud800 to \\udfff), which is no character.")
    except RecursionError:
        _refuse("The body is nested too deeply.")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if value is None:
        return
    kinds = int if name in _INTEGERS else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an integer" if name in _INTEGERS else "a number"
        _refuse(f"`{name}` must be {kind} from {low:g} to {high:g}, got {value!r}.")


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        _refuse("`stop` must be a text or a list of texts that are not empty.")
    if len(stops) > _MOST_STOPS or any(len(stop) > _LONGEST_STOP for stop in stops):
        _refuse(f"`stop` holds at most {_MOST_STOPS} texts of {_LONGEST_STOP} characters.")
    return stops


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        _refuse("`messages` must be a list that is not empty.")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            _refuse(f"`messages[{number}]` must be an object with a `role`.")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        calls = message.get("tool_calls")
        if not isinstance(calls, (list, type(None))) or not all(map(_is_call, calls or [])):
            _refuse(
                f"`messages[{number}].tool_calls` must be a list of calls, their arguments a JSON object as a text."
            )
        is_text = isinstance(content, str) or (content is None and calls)
        if not (is_text or parts) or not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in parts
        ):
            _refuse(f"`messages[{number}].content` must be a text, or a list of parts of type text.")


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments")
    try:
        return isinstance(json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}, dict)
    except (ValueError, RecursionError):
        return False
