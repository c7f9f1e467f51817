"""A request's body that was read before the application behind asks for it: an ASGI server gives it once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any


class Replay:
    """
    `receive` of an ASGI application, for a request whose body has been read.

    Args:
        body (`bytes`):
            What the application is to get as the request's body.
        receive:
            The server's own, which tells what comes behind the body: that the client has gone.
    """

    def __init__(self, body: bytes, receive: Callable[[], Awaitable[dict[str, Any]]]):
        self._first: dict[str, Any] | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> dict[str, Any]:
        """The next message."""
        if self._first is None:
            return await self._receive()
        message, self._first = self._first, None
        return message
