"""
Other programs that draw rollouts: `vllm_engine.py` starts vLLM, `endpoint.py` asks a server that runs already, over
the client of `client.py`; `engine.py` is what they share.
"""

from __future__ import annotations

from typing import Any

from ...settings import RolloutSettings
from .engine import Engine


def engine_of(settings: RolloutSettings, **known: Any) -> Engine:
    """
    The engine that settings name, not started yet; `known` are the arguments of [`Engine`].

    Raises:
        `ValueError`: for arguments that it does not take, or sampling that it cannot do. `ImportError`: names the
        extra.
    """
    if settings.engine == "vllm":
        from .vllm_engine import VLLMEngine as Kind
    else:
        from .endpoint import EndpointEngine as Kind
    return Kind(settings.engine, settings.engine_arguments, **known)
