"""What to start vLLM with, to serve a controlled model."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from ...configuration import ControlConfig
from ...utils.extras import needs_extra
from .served import Served

# As loader.py, which imports vLLM.
_LOAD_FORMAT = "recontrol"
_MIDDLEWARE = "hf_recontrol.integrations.vllm.middleware.ControlFields"
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
        "load_format": _LOAD_FORMAT,
        "logits_processors": [_PROCESSORS + served.name],
    }


def serve_vllm(
    base: str | os.PathLike,
    heads: Mapping[str, str | os.PathLike],
    control: ControlConfig | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: str | None = None,
    extra_arguments: Sequence[str] = (),
) -> NoReturn:
    """
    Become vLLM's OpenAI server of a controlled model (`vllm serve`): this process is replaced by it.

    Args:
        base, heads, control, served_model_name:
            As `base`, `value_heads`, ... of [`recontrol_engine_args`].
        host (`str`, *optional*), port (`int`, *optional*):
            Where to listen.
        api_key (`str`, *optional*):
            What clients must send. It is passed in the environment, where other users of the machine do not see it.
        extra_arguments (sequence of `str`, *optional*):
            Further arguments of `vllm serve`, such as `["--dtype", "bfloat16"]`.

    Raises:
        `ImportError`: if vLLM is not installed. `OSError`, `ValueError`: as [`recontrol_engine_args`], or if
        `extra_arguments` set what control needs.
    """
    command = server_command(base, heads, control, host, port, served_model_name, extra_arguments)
    with needs_extra("vllm", "Serving on vLLM"):
        if find_spec("vllm") is None:
            raise ImportError("vllm")
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "0"} | ({} if api_key is None else {"VLLM_API_KEY": api_key})
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, os.environ | environment)


def _runs_on_cpu() -> bool:
    if find_spec("vllm") is None:
        return False
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def server_command(
    base: str | os.PathLike,
    heads: Mapping[str, str | os.PathLike],
    control: ControlConfig | None,
    host: str,
    port: int,
    served_model_name: str | None,
    extra_arguments: Sequence[str],
) -> list[str]:
    """The command that [`serve_vllm`] runs; arguments and errors as there."""
    arguments = recontrol_engine_args(base, heads, control, served_model_name)
    ours = {
        "--host": [host],
        "--port": [str(port)],
        "--served-model-name": arguments["served_model_name"],
        "--load-format": [arguments["load_format"]],
        "--logits-processors": arguments["logits_processors"],
    }
    given = {argument.partition("=")[0].replace("_", "-") for argument in extra_arguments}
    if taken := sorted(given & ours.keys()):
        raise ValueError(f"{taken[0]} is set for the control of the model, or has an option of its own: leave it out.")
    if _runs_on_cpu() and not given & {"--enable-chunked-prefill", "--no-enable-chunked-prefill"}:
        # There a request with a seed whose prompt is read in pieces ends vLLM: no CPU's generator can go back.
        extra_arguments = ["--no-enable-chunked-prefill", *extra_arguments]
    return [
        sys.executable,
        *("-m", "vllm.entrypoints.launchers.api_server.entry", "--model", arguments["model"]),
        *(part for name, values in ours.items() for part in (name, *values)),
        *("--middleware", _MIDDLEWARE),
        *extra_arguments,
    ]
