"""What stands before the server's endpoints: the API key, and limits on sizes, times and numbers of requests."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from contextvars import ContextVar
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect, Request

from ..request_body import Replay

# Needs no key: it is asked by what watches over the server.
_OPEN = ("/health",)
# Seconds in which a request's body must have come, whole.
_BODY_SECONDS = 30
# Seconds for which what still comes of a refused one is dropped, in all and up to its next part.
_DROP_SECONDS, _NEXT_SECONDS = 10, 1


def error_response(status: int, message: str, **headers: str) -> JSONResponse:
    """An error as OpenAI's API shows it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status_code=status, headers=headers)


class _Refused(Exception):
    """A request that is not handed on."""

    def __init__(self, status: int, message: str, **headers: str):
        self.status, self.message, self.headers = status, message, headers


class _Incoming:
    """`receive` of a request, which knows if more of the body is to come."""

    def __init__(self, receive, headers: dict[bytes, bytes]):
        self._receive = receive
        self.more = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

    async def __call__(self) -> dict[str, Any]:
        message = await self._receive()
        self.more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def drop(self) -> None:
        """Read on, while it comes: neither a server that ends nor anybody else waits long for a client that stays."""
        until = time.monotonic() + _DROP_SECONDS
        with contextlib.suppress(asyncio.TimeoutError):
            while self.more and time.monotonic() < until:
                await asyncio.wait_for(self(), _NEXT_SECONDS)


async def _refuse(refused: _Refused, scope: dict[str, Any], incoming: _Incoming, send) -> None:
    """
    Answer at once, then read and drop what is still sent: a connection that is closed on bytes that nobody has read is
    reset, and the client never sees the answer.
    """
    # On a connection that stays, the rest of the body would still be waited for.
    closing = {"Connection": "close"} if incoming.more else {}

    async def open_ended(message: dict[str, Any]) -> None:
        await send(message | {"more_body": True} if message["type"] == "http.response.body" else message)

    answer = error_response(refused.status, refused.message, **refused.headers, **closing)
    await answer(scope, incoming, open_ended)
    await incoming.drop()
    await send({"type": "http.response.body", "body": b""})


# Of the request that is being answered: set when nobody waits for the answer any more.
GONE: ContextVar[threading.Event | None] = ContextVar("gone", default=None)


class Gone:
    """
    `receive` of a request whose body has been read: waits for the client to go. It does so from the beginning, since
    an application that draws an answer whole asks for nothing meanwhile.

    Attributes:
        flag (`threading.Event`):
            Set when the client has gone.
    """

    def __init__(self, receive):
        self.flag, self._receive = threading.Event(), receive
        self._waiting = asyncio.ensure_future(self._wait())

    async def _wait(self) -> dict[str, Any]:
        while (message := await self._receive())["type"] != "http.disconnect":
            pass
        self.flag.set()
        return message

    async def __call__(self) -> dict[str, Any]:
        return await asyncio.shield(self._waiting)

    def end(self) -> None:
        """The request is answered."""
        self._waiting.cancel()


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
        headers = dict(scope["headers"])
        incoming = _Incoming(receive, headers)
        try:
            self._check(headers)
            # Read here: an error raised while the application reads is told as one of its own.
            body = await asyncio.wait_for(self._body(Request(scope, incoming)), _BODY_SECONDS)
            self._check_room()
        except ClientDisconnect:
            return
        except asyncio.TimeoutError:
            message = f"The request's body did not come within {_BODY_SECONDS} seconds: send it again."
            await error_response(408, message, Connection="close")(scope, incoming, send)
            return
        except _Refused as refused:
            await _refuse(refused, scope, incoming, send)
            return
        self._running += 1
        gone = Gone(receive)
        GONE.set(gone.flag)
        try:
            await self.app(scope, Replay(body, gone), send)
        finally:
            gone.end()
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
            raise _Refused(401, "This server wants its API key: `Authorization: Bearer ...`.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            raise self._too_large()
        self._check_room()

    def _check_room(self) -> None:
        if self._running >= self.max_requests:
            raise self._no_room()

    def _no_room(self) -> _Refused:
        message = "The server has no room for one more request now: try again."
        return _Refused(503, message, **{"Retry-After": "1"})

    def _too_large(self) -> _Refused:
        return _Refused(413, f"A request may have {self.max_body_bytes} bytes.")
