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


class _TooLarge(Exception):
    pass


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
        headers = dict(scope["headers"])
        refusal = self._refusal(headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        read = 0
        has_begun = False

        async def limited() -> dict[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise _TooLarge
            return message

        async def sending(message: dict[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        self._running += 1
        try:
            await self.app(scope, limited, sending)
        except _TooLarge:
            if not has_begun:
                await self._too_large()(scope, receive, send)
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
            return error_response(503, "The server has no room for one more request now: try again.", **_RETRY)
        return None

    def _too_large(self) -> JSONResponse:
        return error_response(413, f"A request may have {self.max_body_bytes} bytes.")


_RETRY = {"Retry-After": "1"}
