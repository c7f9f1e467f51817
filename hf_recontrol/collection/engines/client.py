"""The client of an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import OpenAI

# Bytes of an answer, far more than any has that is asked for here.
_LARGEST = 2**24


def openai_client(
    name: str,
    base_url: str | None,
    key: str | None,
    key_variable: str | None,
    *,
    timeout: float,
    max_retries: int,
    concurrency: int | None = None,
) -> OpenAI:
    """
    A client whose calls end: an answer may not be larger than 16 MB, nor take longer than the time limit.

    Args:
        name (`str`):
            What settings of the endpoint are called: `"judge"`, ...
        base_url (`str`, *optional*):
            Of the endpoint. Defaults to what the client takes.
        key (`str`, *optional*), key_variable (`str`, *optional*):
            The key, and the environment variable that it is from; `None` where none is needed.
        timeout (`float`):
            Seconds a call may take.
        max_retries (`int`):
            How often a call that failed is made again.
        concurrency (`int`, *optional*):
            How many calls are made at once. Each has a connection, which the next one takes over.

    Raises:
        `ImportError`: if `openai` is missing. `ValueError`: if there is no key, or it cannot be sent.
    """
    from openai import DefaultHttpxClient, OpenAI

    if key_variable is not None and not key:
        raise ValueError(
            f"The {name}'s key is missing: set the environment variable that `{name}.api_key_env` names "
            "(default: OPENAI_API_KEY), or `api_key_env: null` where none is needed."
        )
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError(f"The {name}'s key has characters that no key has: only printable ASCII can be sent.")

    # Which library for HTTP it is depends on the release of openai.
    http = sys.modules[DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]

    def bound(response: Any) -> None:
        """Give a body up that does not end: the client's own limit is for each piece of it."""
        pieces, end = response.iter_bytes, time.monotonic() + timeout

        def bounded(*arguments: Any) -> Iterator[bytes]:
            size = 0
            for piece in pieces(*arguments):
                size += len(piece)
                if size > _LARGEST or time.monotonic() > end:
                    raise http.ReadTimeout("The answer does not end.", request=response.request)
                yield piece

        response.iter_bytes = bounded

    more = {}
    if concurrency is not None:
        more["limits"] = http.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    return OpenAI(
        api_key=key or "none",
        base_url=base_url,
        timeout=timeout,
        max_retries=max_retries,
        http_client=DefaultHttpxClient(event_hooks={"response": [bound]}, **more),
    )


def key_of(variable: str | None) -> str | None:
    """The key that an environment variable holds."""
    return None if variable is None else os.environ.get(variable, "").strip()
