"""What to start vLLM with, to serve a controlled model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ...configuration import ControlConfig
from .plugin import LOAD_FORMAT
from .served import Served

_PROCESSORS = "hf_recontrol.integrations.vllm.processor:heads."


def recontrol_engine_args(
    base: str | os.PathLike,
    value_heads: Mapping[str, str | os.PathLike],
    control: ControlConfig | None = None,
    served_model_name: str | None = None,
) -> dict[str, Any]:
    """
    Keyword arguments for `vllm.LLM` (and `vllm.EngineArgs`) that put a model under control.

    ```python
    llm = LLM(**recontrol_engine_args("org/base", {"default": "user/my-value-head"}), dtype="bfloat16")
    llm.generate(prompts, SamplingParams(extra_args={"control": {"step_size": 1.0}}))
    ```

    Args:
        base (`str` or `os.PathLike`):
            A base model, as `model` of vLLM.
        value_heads (mapping of `str` to `str` or `os.PathLike`):
            Folder or Hub repo of each head, by name. The first one acts where a request names none.
        control ([`ControlConfig`], *optional*):
            The first head's, where requests do not change it. Defaults to what it recommends.
        served_model_name (`str`, *optional*):
            What clients call the base. Defaults to `base`.

    Raises:
        `OSError`, `ValueError`: if a head cannot be loaded or cannot do what it is asked for.
    """
    base = os.fspath(base)
    paths = {
        name: os.path.abspath(path) if os.path.exists(path) else os.fspath(path) for name, path in value_heads.items()
    }
    served = Served(served_model_name or base, paths, None if control is None else control.to_dict())
    return {
        "model": base,
        "served_model_name": served.heads.settings.models,
        "load_format": LOAD_FORMAT,
        "logits_processors": [_PROCESSORS + served.name],
    }
