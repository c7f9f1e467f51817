"""What draws rollouts."""

from __future__ import annotations

import json

from ..utils.checks import check_endpoint_url, check_no_secret
from ..utils.setting_fields import Settings, setting, settings_class

OWN_ENGINE = "transformers"


@settings_class("Engine")
class EngineSettings(Settings):
    """What draws the responses."""

    engine: str = setting(
        OWN_ENGINE,
        "What draws the responses: `transformers`; `vllm`, an engine that is started here; or the URL of a server "
        "that runs already, such as http://localhost:8000/v1, if its completions can return token ids (vLLM's can).",
    )
    engine_arguments: dict = setting(
        {},
        "For `vllm`: arguments of its engine by name, such as tensor_parallel_size. For a URL: `model` (its name "
        "there), `concurrency` (requests at once), `timeout` (seconds for each), `api_key_env` (the environment "
        "variable with the key).",
        default_text="none",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.engine not in (OWN_ENGINE, "vllm"):
            if "://" not in self.engine:
                raise ValueError(f"`engine` must be 'transformers', 'vllm' or a URL, got {self.engine!r}.")
            check_endpoint_url("engine", self.engine, "engine_arguments.api_key_env")
        if self.engine_arguments and self.engine == OWN_ENGINE:
            raise ValueError("`engine_arguments` are for another engine than transformers: set `engine`, too.")
        check_no_secret(
            "engine_arguments",
            self.engine_arguments,
            "put a server's key into the environment variable that its `api_key_env` names, and a token of the Hub "
            "into HF_TOKEN.",
        )
        try:
            json.dumps(self.engine_arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"`engine_arguments` must hold what JSON can hold ({error}).") from error
