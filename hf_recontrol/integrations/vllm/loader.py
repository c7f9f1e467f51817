"""The load format `recontrol`: vLLM's own loading, and control on what it has loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ...utils.extras import needs_extra
from .batch import Batch
from .layer import attach

with needs_extra("vllm", "Control in vLLM"):
    from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

LOAD_FORMAT = "recontrol"
# Where the batch of an engine stands on its configuration, which processor and loader are both given.
_BATCH = "recontrol_batch"
# Extra configuration of ours, beside that of vLLM's own loader.
_INNER = "load_format"


@register_model_loader(LOAD_FORMAT)
class ReControlLoader(DefaultModelLoader):
    """
    Loads a base as `load_format="auto"` does (or as `model_loader_extra_config={"load_format": ...}` says) and puts it
    under the control of the heads that `logits_processors` names.

    Raises:
        `ValueError`: if the engine runs in a mode, or the model is of a kind, that cannot be controlled.
    """

    def __init__(self, load_config: Any):
        extra = dict(load_config.model_loader_extra_config or {})
        inner = extra.pop(_INNER, "auto")
        super().__init__(replace(load_config, load_format=inner, model_loader_extra_config=extra))

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """The model, under control."""
        check_engine(vllm_config)
        batch = getattr(vllm_config, _BATCH, None)
        if batch is None:
            raise ValueError(
                "`load_format='recontrol'` needs heads, which `logits_processors` names: take all arguments from "
                "`recontrol_engine_args`."
            )
        model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        attach(model, batch, model_config)
        return model


def use_batch(vllm_config: Any, batch: Batch) -> None:
    """Make a batch that of the engine with this configuration, whose model is still to be loaded."""
    setattr(vllm_config, _BATCH, batch)


def check_engine(vllm_config: Any) -> None:
    """Raise `ValueError` if an engine runs in a mode that cannot be controlled."""
    modes = {
        "its model runner V2, which does not tell a model whose states it is given: set the environment variable "
        "VLLM_USE_V2_MODEL_RUNNER=0": getattr(vllm_config, "use_v2_model_runner", False),
        "speculative decoding, where a request has several states in a step": (
            vllm_config.speculative_config is not None
        ),
        "LoRA adapters (`enable_lora`), which wrap the layer that control sits in": vllm_config.lora_config
        is not None,
        "elastic expert parallelism, whose new workers do not load the model": (
            getattr(vllm_config.parallel_config, "enable_elastic_ep", False)
        ),
    }
    for mode, is_on in modes.items():
        if is_on:
            raise ValueError(f"A controlled model cannot run in vLLM with {mode}.")
