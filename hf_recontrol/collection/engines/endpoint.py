"""A server that runs already, behind an OpenAI-compatible API, as what draws rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from ...utils.checks import check_int, check_number, check_text, check_variable_name
from ...utils.extras import needs_extra
from .client import key_of, openai_client
from .engine import Completion, Engine, EngineSampling, Request

_DEFAULT_KEY = "OPENAI_API_KEY"
_MAX_RETRIES = 5
# Seconds.
_LISTED_WITHIN = 30.0
# Files beside the connections that a process has open, far more than it needs.
_OTHER_FILES = 256
# Characters of what a server says that an error repeats.
_SHOWN = 500


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """`engine_arguments` of a server: its name of the model, how it is asked, and where its key is."""

    model: str | None = None
    concurrency: int = 64
    timeout: float = 600.0
    api_key_env: str | None = None

    def __post_init__(self):
        if self.model is not None:
            check_text("engine_arguments.model", self.model)
        check_int("engine_arguments.concurrency", self.concurrency, low=1, high=4096)
        check_number("engine_arguments.timeout", self.timeout, above=0)
        check_variable_name("engine_arguments.api_key_env", self.api_key_env)


def _let_open(connections: int) -> None:
    """Let this process have so many connections: where the limit of open files is lower, up to what it may be."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _OTHER_FILES
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, highest))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"`engine_arguments.concurrency` ({connections}) needs {needed} open files, and this process may have "
            f"{highest}: lower it, or raise the limit (`ulimit -n`)."
        ) from error


class EndpointEngine(Engine):
    """
    A server whose `/v1/completions` takes token ids and, asked with `return_token_ids`, returns those that it drew, as
    vLLM's does. Several processes may ask the same one.
    """

    @property
    def settings(self) -> dict[str, Any]:
        # Another address may have the same model: `check_model` looks.
        return {"name": "endpoint"}

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        if unknown := sorted(arguments.keys() - _Arguments.__dataclass_fields__.keys()):
            raise ValueError(
                f"`engine_arguments` of a server know no {unknown[0]!r}: there are "
                f"{', '.join(_Arguments.__dataclass_fields__)}."
            )
        _Arguments(**arguments)
        with needs_extra("compare", "A server as engine"):
            import openai  # noqa: F401

    def check_control(self) -> None:
        if self.is_controlled:
            raise ValueError(
                "Whether a server's heads are the same cannot be seen from here, so it draws for the base alone: for "
                "responses under a control take `engine='vllm'`."
            )

    @cached_property
    def _given(self) -> _Arguments:
        return _Arguments(**self.arguments)

    @contextmanager
    def running(self, longest: int) -> Iterator[None]:
        given = self._given
        variable = given.api_key_env
        # Many servers of one's own need none.
        key = key_of(variable or _DEFAULT_KEY)
        _let_open(given.concurrency)
        with openai_client(
            "engine",
            self.name,
            key,
            variable,
            timeout=given.timeout,
            max_retries=_MAX_RETRIES,
            concurrency=given.concurrency,
        ) as client:
            self._client = client
            self._model = given.model or self._served_model(longest)
            yield

    def _served_model(self, longest: int) -> str:
        """The server's name of the base: the same, or that of its only model, if that has room for its prompts."""
        from openai import APIError

        # Drawing may take its time; a list of models that does not come at once never comes.
        quick = self._client.with_options(max_retries=0, timeout=min(_LISTED_WITHIN, self._given.timeout))
        try:
            rooms = {model.id: getattr(model, "max_model_len", None) for model in quick.models.list()}
        except (APIError, ValueError, TypeError, AttributeError) as error:
            raise self._dead(error) from None
        base = str(self.model.config._name_or_path)
        if base not in rooms:
            # Heads of a server of ours are models too.
            bases = [name for name in rooms if name.rpartition(":")[0] not in rooms]
            if len(bases) != 1:
                raise ValueError(
                    f"The server at {self.name} serves {', '.join(rooms) or 'nothing'}, and no {base}: say which one "
                    "it is (`engine_arguments`: `model`)."
                )
            (base,) = bases
        self._check_room(longest, rooms[base])
        return base

    def complete(self, requests: Iterable[Request], sampling: EngineSampling) -> Iterator[Completion]:
        requests, concurrency = iter(requests), self._given.concurrency
        asked, answered = SimpleQueue(), SimpleQueue()
        workers = waiting = 0

        def work() -> None:
            while (request := asked.get()) is not None:
                try:
                    answered.put(self._ask(request, sampling))
                except BaseException as error:
                    return answered.put(error)

        try:
            while True:
                for request in islice(requests, 2 * concurrency - waiting):
                    asked.put(request)
                    waiting += 1
                    if workers < min(waiting, concurrency):
                        # Those of a pool would be waited for at the exit: after Ctrl-C as long as a server is silent.
                        Thread(target=work, name=f"engine-{workers}", daemon=True).start()
                        workers += 1
                if not waiting:
                    return
                answer = answered.get()
                waiting -= 1
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            with suppress(Empty):
                while True:
                    asked.get_nowait()
            for _ in range(workers):
                asked.put(None)

    def _ask(self, request: Request, sampling: EngineSampling) -> Completion:
        from openai import APIError, APIStatusError

        fields = sampling.fields()
        body = {name: fields.pop(name) for name in ("max_tokens", "temperature", "top_p")}
        # Servers of ours steer where a request says nothing.
        fields |= {"return_token_ids": True, "vllm_xargs": {"control": "false"}}
        try:
            answer = self._client.completions.create(
                model=self._model, prompt=request.prompt_ids, seed=request.seed, extra_body=fields, **body
            )
        except APIStatusError as error:
            if error.status_code in (400, 413, 422):
                raise ValueError(
                    f"The server at {self.name} does not take a request: {str(error.message)[:_SHOWN]}"
                ) from None
            raise self._dead(error) from None
        except (APIError, ValueError, RecursionError) as error:
            raise self._dead(error) from None
        if not hasattr(answer, "choices"):
            raise ValueError(f"What answers at {self.name} is no such server: does its URL end in /v1?")
        try:
            (choice,) = answer.choices
            ids, seen, reason = choice.token_ids, choice.prompt_token_ids, choice.finish_reason
        except (AttributeError, TypeError, ValueError):
            ids = None
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(
                f"The server at {self.name} returns no token ids with its completions: rollouts need one that does, "
                "such as vLLM's."
            )
        if seen != request.prompt_ids:
            raise ValueError(f"The server at {self.name} did not read a prompt as it was sent, so it is no engine.")
        if reason not in ("stop", "length"):
            raise ValueError(f"The server at {self.name} gave a response up ({reason!r}).")
        return Completion(request.key, ids, reason == "stop")

    def _dead(self, error: Exception) -> OSError:
        status = getattr(error, "status_code", None)
        said = type(error).__name__ if status is None else f"{type(error).__name__}, status {status}"
        hint = {401: " Is the key right (`engine_arguments`: `api_key_env`)?", 404: " Does its URL end in /v1?"}
        return OSError(
            f"The server at {self.name} does not answer ({said}).{hint.get(status, '')} What was drawn is kept: the "
            "same call goes on from there."
        )
