"""A language model behind an OpenAI-compatible endpoint as a judge."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from ...collection.engines.client import key_of, openai_client
from ...utils.checks import check_endpoint_url, check_int, check_number, check_variable_name
from ...utils.extras import needs_extra
from .judge import Question, Verdict
from .language import LanguageJudge, Reply

# Names of a request's fields that hold secrets; not `max_tokens`.
_SECRET_FIELDS = re.compile(
    r'"[^"]*(api.?key|secret|passw|authori[sz]ation|credential|bearer)[^"]*": |"[^"]*token": "', re.IGNORECASE
)
# Fields of a request that are ours, and what is none of its fields or holds secrets.
_OWN_ARGUMENTS = ("model", "messages", "n", "stream", "extra_headers", "extra_query", "extra_body", "timeout")
# What an endpoint answers to one question that it will not take, and to all of them if its settings are wrong.
_NOT_TAKEN = (400, 403, 413, 422)
_HINTS = {
    401: " Is the key right?",
    403: " May this key use the model?",
    404: " Are `base_url` and `model` right?",
}
# Characters of what an endpoint says that an error repeats.
_SHOWN = 500
# So much of a key tells what it is. What is shorter than a key is what servers are given that need none.
_PIECE, _SHORTEST_KEY = 6, 8


@dataclass(frozen=True, kw_only=True)
class EndpointJudge(LanguageJudge):
    """
    A language model behind an OpenAI-compatible endpoint.

    Args:
        base_url (`str`, *optional*):
            Of the endpoint. By default what the environment variable `OPENAI_BASE_URL` says, else OpenAI's.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            The environment variable that holds the key; `None` where none is needed. The key is never written.
        timeout (`float`, *optional*, defaults to 60):
            Seconds a call may take.
        concurrency (`int`, *optional*, defaults to 4):
            Calls at once.
        price_per_million_input, price_per_million_output (`float`, *optional*):
            What tokens cost.
        request (`dict`, *optional*):
            More fields of each request's body, or others instead of ours; `None` leaves one out.
    """

    base_url: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    timeout: float = 60.0
    concurrency: int = 4
    price_per_million_input: float | None = None
    price_per_million_output: float | None = None
    request: dict[str, Any] = field(default_factory=dict)

    asked: ClassVar[tuple[str, ...]] = (*LanguageJudge.asked, "request")

    def __post_init__(self):
        super().__post_init__()
        check_number("judge.timeout", self.timeout, above=0)
        check_int("judge.concurrency", self.concurrency, low=1, high=256)
        for name in ("input", "output"):
            if (price := getattr(self, f"price_per_million_{name}")) is not None:
                check_number(f"judge.price_per_million_{name}", price, low=0)
        if (self.price_per_million_input is None) != (self.price_per_million_output is None):
            raise ValueError(
                "`judge` needs both `price_per_million_input` and `price_per_million_output`, or neither."
            )
        if self.base_url is not None:
            self._check_url(self.base_url)
        check_variable_name("judge.api_key_env", self.api_key_env)
        if not isinstance(self.request, dict) or not all(isinstance(name, str) for name in self.request):
            raise ValueError("`judge.request` must be an object: fields of each request, by name.")
        if own := [name for name in _OWN_ARGUMENTS if name in self.request]:
            raise ValueError(f"`judge.request` must not hold `{own[0]}`.")
        try:
            written = json.dumps(self.request, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("`judge.request` must be what JSON can hold.") from None
        if _SECRET_FIELDS.search(written):
            raise ValueError(
                "`judge.request` must hold no key, since it is written to files: put it into the environment variable "
                "that `judge.api_key_env` names."
            )

    @classmethod
    def of(cls, given: dict[str, Any]) -> EndpointJudge:
        if "api_key" in given:
            raise ValueError("A key does not belong in a file: name its environment variable (`judge.api_key_env`).")
        return super().of(given)

    def depends_on(self) -> dict[str, Any]:
        return super().depends_on() | {"base_url": self._url}

    @property
    def input_price(self) -> float | None:
        return None if self.price_per_million_input is None else self.price_per_million_input / 1e6

    @property
    def output_price(self) -> float | None:
        return None if self.price_per_million_output is None else self.price_per_million_output / 1e6

    @cached_property
    def client(self) -> Any:
        """
        What asks.

        Raises:
            `ImportError`: names the extra. `ValueError`: if there is no key, it cannot be sent, or it stands among the
            settings.
        """
        key = self._key
        if self.base_url is None and self._url is not None:
            self._check_url(self._url)
        if len(key or "") >= _SHORTEST_KEY and key in json.dumps(self.depends_on(), ensure_ascii=False):
            raise ValueError(
                "The judge's key stands in its settings, which are written to files: take it out, or, if the endpoint "
                "needs none, say `api_key_env: null`."
            )
        with needs_extra("compare", "A judge behind an endpoint"):
            return openai_client(
                "judge", self._url, key, self.api_key_env, timeout=self.timeout, max_retries=self.max_retries
            )

    @property
    def _key(self) -> str | None:
        return key_of(self.api_key_env)

    @property
    def _url(self) -> str | None:
        return os.environ.get("OPENAI_BASE_URL", "").strip() or None if self.base_url is None else self.base_url

    @staticmethod
    def _check_url(url: Any) -> None:
        check_endpoint_url("judge.base_url", url, "judge.api_key_env")

    def shown(self, text: str) -> str:
        return self._without_key(super().shown(text))

    def check(self) -> None:
        """
        Ask something small.

        Raises:
            `OSError`: names an endpoint that does not answer as it should, or whose reply is cut off. `ValueError`,
            `ImportError`: as `client`.
        """
        client = self.client
        from openai import APIStatusError

        try:
            found = self._create([{"role": "user", "content": "Reply with the word OK."}])
        except APIStatusError as error:
            raise OSError(
                f"The judge's endpoint at {client.base_url} does not take the request (status {error.status_code})."
                f"{_HINTS.get(error.status_code, '')} It says: {self._without_key(str(error.message)[:_SHOWN])}"
            ) from None
        if found is None or not found.choices:
            raise OSError(
                f"What the judge's endpoint at {client.base_url} answers is no chat completion: is `base_url` "
                "right? It mostly ends in /v1."
            )
        said = getattr(getattr(found.choices[0], "message", None), "content", None)
        is_cut = getattr(found.choices[0], "finish_reason", None) == "length"
        if is_cut or not isinstance(said, str) or not said.strip():
            raise OSError(
                f"The judge {self.model} was asked for one word, and its reply is {'cut off' if is_cut else 'empty'}: "
                f"a model that thinks first needs more room, such as `max_tokens: 4096` (it is {self.max_tokens})."
            )

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """
        Raises:
            `OSError`: if the endpoint is dead. One that says nothing to a question is asked something small, to know
            whether it is the question.
        """
        found = super().verdicts(questions)
        if any(verdict.value is None and not verdict.input_tokens for verdict in found):
            self.check()
        return found

    def replies(self, talks: Sequence[list[dict[str, str]]]) -> list[Reply]:
        """
        Raises:
            `OSError`: if the endpoint is dead.
        """
        return [self._reply(talk) for talk in talks]

    def _reply(self, messages: list[dict[str, str]]) -> Reply:
        from openai import APIStatusError

        try:
            found = self._create(messages)
        except APIStatusError:
            return Reply("", refused=True)
        if found is None:
            return Reply(None)
        usage = getattr(found, "usage", None)
        spent = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        spent = [count if isinstance(count, int) else 0 for count in spent]
        choice = found.choices[0] if found.choices else None
        message = getattr(choice, "message", None)
        refused = bool(getattr(message, "refusal", None)) or getattr(choice, "finish_reason", "") == "content_filter"
        text = getattr(message, "content", None)
        return Reply(text if isinstance(text, str) else None, refused, *spent)

    def _create(self, messages: list[dict[str, str]]) -> Any:
        """
        The endpoint's answer; `None` if that is no chat completion.

        Raises:
            `openai.APIStatusError`: if it does not take this request. `OSError`: if it is dead.
        """
        from openai import APIError, APIResponseValidationError

        body = {"temperature": 0, "max_tokens": self.max_tokens} | self.request
        body = {name: value for name, value in body.items() if value is not None}
        # Half of a character cannot be sent.
        messages = [turn | {"content": turn["content"].encode("utf-8", "replace").decode()} for turn in messages]
        client = self.client
        try:
            found = client.chat.completions.create(model=self.model, messages=messages, extra_body=body)
        except (APIResponseValidationError, ValueError, RecursionError):  # no JSON, or none that can be read
            return None
        except APIError as error:
            if getattr(error, "status_code", None) in _NOT_TAKEN:
                raise
            raise self._dead(error) from None
        # Of a body that is something else the client makes whatever it is.
        return found if isinstance(getattr(found, "choices", None), list) else None

    def _dead(self, error: Exception) -> OSError:
        """Without its cause: an endpoint may repeat the key in its answer."""
        from openai import APITimeoutError

        status = getattr(error, "status_code", None)
        said = type(error).__name__ if status is None else f"{type(error).__name__}, status {status}"
        slow = " Give it a larger `timeout`, or fewer calls at once (`concurrency`)."
        hint = slow if isinstance(error, APITimeoutError) else _HINTS.get(status, "")
        return OSError(
            f"The judge at {self.client.base_url} does not answer ({said}).{hint} What was done is "
            "kept: the same call goes on from there."
        )

    def _without_key(self, text: str) -> str:
        key = self._key or ""
        if len(key) < _SHORTEST_KEY:
            return text
        text = text.replace(key, "***")
        for start in range(len(key) - _PIECE + 1):
            text = text.replace(key[start : start + _PIECE], "***")
        return text
