"""What stands before the server's endpoints: the API key, and limits on sizes and numbers of requests."""

from __future__ import annotations

import secrets
from typing import Any

from fastapi.responses import JSONResponse

# Needs no key: it is asked by what watches over the server.
_OPEN = ("/health",)


def error_response(status: int, message: str, **headers: str) -> JSONResponse:
    """An error as OpenAI's API shows it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status_code=status, headers=headers)


class Gate:
    """
    ASGI middleware.

    Args:
        app:
            What it stands before.
        api_key (`str`, *optional*):
            What requests must bring as `Authorization: Bearer`.
        max_body_bytes (`int`):
            Of a request's body; more is 413.
        max_requests (`int`):
            Requests at once, those that wait for their turn included; one more is 503.
    """

    def __init__(self, app, api_key: str | None, max_body_bytes: int, max_requests: int):
        self.app, self.max_body_bytes, self.max_requests = app, max_body_bytes, max_requests
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._running = 0

    async def __call__(self, scope: dict[str, Any], receive, send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(dict(scope["headers"]))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._running += 1
        try:
            # Read here: an error raised while the application reads is told as one of its own.
            body, is_whole = b"", False
            while not is_whole:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                is_whole = not message.get("more_body", False)
                if len(body) > self.max_body_bytes:
                    await self._too_large()(scope, receive, send)
                    return
            await self.app(scope, _Replay(body, receive), send)
        finally:
            self._running -= 1

    def _refusal(self, headers: dict[bytes, bytes]) -> JSONResponse | None:
        if self._expected is not None and not secrets.compare_digest(
            headers.get(b"authorization", b""), self._expected
        ):
            return error_response(401, "This server wants its API key: `Authorization: Bearer ...`.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return self._too_large()
        if self._running >= self.max_requests:
            return error_response(
                503, "The server has no room for one more request now: try again.", **{"Retry-After": "1"}
            )
        return None

    def _too_large(self) -> JSONResponse:
        return error_response(413, f"A request may have {self.max_body_bytes} bytes.")


class _Replay:
    """`receive` for an application whose request's body was read before."""

    def __init__(self, body: bytes, receive):
        self._first: dict[str, Any] | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> dict[str, Any]:
        if self._first is None:
            return await self._receive()
        message, self._first = self._first, None
        return message
