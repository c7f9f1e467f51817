"""A request's model and its fields of control, on the way to where vLLM's server reads requests."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from ...utils.extras import needs_extra
from ..request_body import Replay
from ..request_settings import FIELDS
from .served import MODEL_FIELD

with needs_extra("vllm", "Control in vLLM"):
    from fastapi import HTTPException
    from starlette.requests import ClientDisconnect, Request

# What carries extra arguments to the sampling, by the end of its path.
_CARRYING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
# What reads a prompt and draws no tokens.
_READING = ("/tokenize", "/detokenize", "/render", "/derender", "/count_tokens")
_EXTRA = "vllm_xargs"


class ControlFields:
    """
    An ASGI middleware for vLLM's OpenAI server (`--middleware`).

    The name of a request's model chooses the head, and `control` and `value_heads` may stand at the top of its body as
    on our own server: vLLM hands neither to the sampling. They travel in `vllm_xargs`, as JSON texts, since objects
    and booleans are not admitted there. Everything else passes as it is. A body is read when the application asks for
    it, which vLLM's does behind its check of the API key.

    Args:
        app:
            The application behind.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Handle one request."""
        headers = dict(scope.get("headers") or [])
        is_json = b"json" in headers.get(b"content-type", b"").lower()
        if scope["type"] != "http" or scope["method"] != "POST" or not is_json:
            return await self.app(scope, receive, send)
        names = getattr(getattr(scope["app"].state, "args", None), "served_model_name", None) or []
        replay: Replay | None = None

        async def changed() -> dict[str, Any]:
            nonlocal replay
            if replay is None:
                try:
                    body = await Request(scope, receive).body()
                    replay = Replay(with_fields(body, scope["path"], names[1:]), receive)
                except ClientDisconnect:
                    return {"type": "http.disconnect"}
                except ValueError as error:
                    raise HTTPException(400, str(error)) from error
            return await replay()

        return await self.app(scope, changed, send)


def with_fields(body: bytes, path: str, models: list[str]) -> bytes:
    """
    A request's body with its model and its fields of control where vLLM carries them.

    Args:
        body (`bytes`):
            As it came. What is no JSON object is left to vLLM to refuse.
        path (`str`):
            Where it was sent.
        models (list of `str`):
            The models that are heads.

    Raises:
        `ValueError`, in words for the client: if they cannot be carried.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(request, dict):
        return body
    fields = {name: request[name] for name in FIELDS if name in request}
    extra = request.get(_EXTRA)
    if extra is not None and not isinstance(extra, dict):
        return body
    is_head = request.get("model") in models
    if not path.endswith(_CARRYING):
        if (fields or is_head) and not path.endswith(_READING):
            raise ValueError(
                f"{path} cannot be controlled by a request: ask {', '.join(_CARRYING[:2])}, or name the base."
            )
        return body
    extra = dict(extra or {})
    if twice := sorted(fields.keys() & extra.keys()):
        raise ValueError(f"`{twice[0]}` is named twice, at the top and in `{_EXTRA}`.")
    fields |= {name: extra.pop(name) for name in FIELDS if name in extra}
    if request.get("use_beam_search") and (fields or is_head):
        raise ValueError(
            "A beam search of vLLM carries no settings of a request, so it follows the first head's own control: name "
            "the base, and leave `control` and `value_heads` out."
        )
    extra |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    extra.pop(MODEL_FIELD, None)
    if is_head:
        extra[MODEL_FIELD] = request["model"]
    if not extra:
        return body
    rest: dict[str, Any] = {name: value for name, value in request.items() if name not in FIELDS}
    return json.dumps(rest | {_EXTRA: extra}).encode()
