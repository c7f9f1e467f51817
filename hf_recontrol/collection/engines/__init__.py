"""
Other programs that draw rollouts: `vllm_engine.py` starts vLLM, `endpoint.py` asks a server that runs already, over
the client of `client.py`; `engine.py` is what they share.
"""

from __future__ import annotations

from typing import Any

from ...settings import OWN_ENGINE, RolloutSettings
from .engine import Engine


def check_engine(settings: RolloutSettings) -> None:
    """Raise what [`engine_of`] raises of the arguments alone, for callers that have no model yet."""
    if settings.engine != OWN_ENGINE:
        _kind_of(settings).check_arguments(settings.engine_arguments)


def engine_of(settings: RolloutSettings, **known: Any) -> Engine:
    """
    The engine that settings name, not started yet; `known` are the arguments of [`Engine`].

    Raises:
        `ValueError`: for arguments that it does not take, or sampling that it cannot do. `ImportError`: names the
        extra.
    """
    return _kind_of(settings)(settings.engine, settings.engine_arguments, **known)


def _kind_of(settings: RolloutSettings) -> type[Engine]:
    if settings.engine == "vllm":
        from .vllm_engine import VLLMEngine as Kind
    else:
        from .endpoint import EndpointEngine as Kind
    return Kind
