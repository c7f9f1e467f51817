"""
An OpenAI-compatible server of a controlled model, on transformers' own: `recontrol serve`.

One answer is drawn at a time, others wait. For many at once there is vLLM (`integrations/vllm/`).
"""

from __future__ import annotations

import logging
import socket
import time
from contextlib import suppress

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.server import build_server

from ..request_settings import RequestSettings
from .gate import Gate, error_response
from .generation import INTERNAL, TOLD, State, take_over
from .handlers import Chat, Completion

# Of transformers' endpoints those that answer for the one model here.
_SERVED = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")


class _Models:
    """What transformers' server asks of its model manager: the list of models, of which none comes or goes."""

    def __init__(self, settings: RequestSettings):
        self._entries = [
            {"id": name, "object": "model", "created": int(time.time()), "owned_by": "hf_recontrol"}
            for name in settings.models
        ]

    def get_gen_models(self) -> list[dict]:
        """Entries of `/v1/models`."""
        return self._entries

    def shutdown(self) -> None:
        """The model stays until the process ends."""


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: RequestSettings,
    *,
    api_key: str | None = None,
    max_body_bytes: int,
    max_requests: int,
) -> FastAPI:
    """
    The application: `/v1/chat/completions`, `/v1/completions`, `/v1/models` and `/health`.

    Args:
        model ([`ReControlForCausalLM`]), tokenizer:
            What is served. The model's heads are those of `settings`, by the same names. Its generation config is
            replaced by one without beams and other modes that cannot be streamed.
        settings ([`RequestSettings`]):
            What requests may ask for.
        api_key (`str`, *optional*):
            What they must bring as `Authorization: Bearer`, but for `/health`.
        max_body_bytes (`int`), max_requests (`int`):
            Bytes of a request, and requests at once, those that wait included.

    Raises:
        `ValueError`: for a tokenizer whose text cannot be streamed.
    """
    if not isinstance(getattr(tokenizer, "_tokenizer", None), Tokenizer):
        raise ValueError(
            f"This base's tokenizer ({type(tokenizer).__name__}) is written in Python, and only those of the "
            "tokenizers library stream text: serve a base that has a `tokenizer.json`."
        )
    state, stops = State(), take_over(model, tokenizer)
    chat, completion = (kind(model, tokenizer, settings, state, stops) for kind in (Chat, Completion))
    app = build_server(
        _Models(settings),
        chat,
        completion_handler=completion,
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if route.path in _SERVED]
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes, max_requests=max_requests)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException):
        return error_response(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError):
        kind = request.headers.get("content-type")
        if kind is None or "json" not in kind:
            return error_response(400, f"The header `Content-Type` must be `application/json`, got {kind!r}.")
        return error_response(400, "The body must be a JSON object.")

    async def failed(request: Request, error: Exception):
        return error_response(400, str(error)) if isinstance(error, TOLD) else error_response(500, INTERNAL)

    for kind in (*TOLD, Exception):
        app.add_exception_handler(kind, failed)
    return app


def listen(host: str, port: int) -> socket.socket:
    """
    A socket that listens (port 0: at a port that is free), so that an address that cannot be had is told at once.

    Raises:
        `OSError`: if it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"Cannot listen on {host}, port {port}: {error.strerror or error}. Name another (`--port`)."
        ) from error


def serve(app: FastAPI, place: socket.socket) -> None:
    """Serve until the process is told to end (Ctrl-C, SIGTERM); answers that are being drawn are finished first."""
    # transformers warns of each request that comes in.
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
    # uvicorn passes Ctrl-C on once it has ended.
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="info")).run(sockets=[place])
