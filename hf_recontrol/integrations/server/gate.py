"""What stands before the server's endpoints: the API key, and limits on sizes, times and numbers of requests."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect, Request

from ..request_body import Replay

# Needs no key: it is asked by what watches over the server.
_OPEN = ("/health",)
# Seconds in which a request's body must have come, whole.
_BODY_SECONDS = 30


def error_response(status: int, message: str, **headers: str) -> JSONResponse:
    """An error as OpenAI's API shows it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status_code=status, headers=headers)


class _Refused(Exception):
    """A request whose body is not read on."""

    def __init__(self, answer: JSONResponse):
        self.answer = answer


class Gate:
    """
    ASGI middleware. A request takes a place among those that are answered when its body is whole, so that one that
    comes slowly keeps nobody out. One that has not come after some time is 408.

    Args:
        app:
            What it stands before.
        api_key (`str`, *optional*):
            What requests must bring as `Authorization: Bearer`.
        max_body_bytes (`int`):
            Of a request's body; more is 413. Bodies that are still coming have `max_requests` times as much together;
            more is 503.
        max_requests (`int`):
            Requests at once, those that wait for their turn included; one more is 503.
    """

    def __init__(self, app, api_key: str | None, max_body_bytes: int, max_requests: int):
        self.app, self.max_body_bytes, self.max_requests = app, max_body_bytes, max_requests
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._running = self._coming_bytes = 0

    async def __call__(self, scope: dict[str, Any], receive, send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self.app(scope, receive, send)
            return
        try:
            self._check(dict(scope["headers"]))
            # Read here: an error raised while the application reads is told as one of its own.
            body = await asyncio.wait_for(self._body(Request(scope, receive)), _BODY_SECONDS)
            self._check_room()
        except ClientDisconnect:
            return
        except asyncio.TimeoutError:
            message = f"The request's body did not come within {_BODY_SECONDS} seconds: send it again."
            # On a connection that stays, the rest of the body would still be waited for.
            await error_response(408, message, Connection="close")(scope, receive, send)
            return
        except _Refused as refused:
            await refused.answer(scope, receive, send)
            return
        self._running += 1
        try:
            await self.app(scope, Replay(body, receive), send)
        finally:
            self._running -= 1

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                self._coming_bytes += len(part)
                if len(body) > self.max_body_bytes:
                    raise self._too_large()
                if self._coming_bytes > self.max_body_bytes * self.max_requests:
                    raise self._no_room()
        finally:
            self._coming_bytes -= len(body)
        return bytes(body)

    def _check(self, headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"authorization", b"")
        if self._expected is not None and not secrets.compare_digest(given, self._expected):
            raise _Refused(error_response(401, "This server wants its API key: `Authorization: Bearer ...`."))
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            raise self._too_large()
        self._check_room()

    def _check_room(self) -> None:
        if self._running >= self.max_requests:
            raise self._no_room()

    def _no_room(self) -> _Refused:
        message = "The server has no room for one more request now: try again."
        return _Refused(error_response(503, message, **{"Retry-After": "1"}))

    def _too_large(self) -> _Refused:
        return _Refused(error_response(413, f"A request may have {self.max_body_bytes} bytes."))
