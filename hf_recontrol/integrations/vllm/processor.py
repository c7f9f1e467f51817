"""What vLLM tells of its batch and asks of its requests."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ...utils.extras import needs_extra
from .batch import Batch
from .loader import use_batch
from .served import Served

with needs_extra("vllm", "Control in vLLM"):
    from vllm import SamplingParams, envs
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality


class ControlProcessor(LogitsProcessor):
    """
    Leaves all logits alone: it checks what requests ask for, and keeps account of which one is in which row.

    Attributes:
        served ([`Served`]):
            The heads. Each set of them has a class of its own, which `heads` makes by its name.
    """

    served: Served

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.heads = self.served.heads
        self.batch = Batch(self.heads.controller)
        use_batch(vllm_config, self.batch)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """
        Refuse a request that asks for what these heads cannot do.

        Raises:
            `ValueError`: in words for the client.
        """
        asked = cls.served.heads.read(sampling_params.extra_args)
        wants_prompt = sampling_params.prompt_logprobs is not None or (
            getattr(sampling_params, "prompt_logprob_token_ids", None) is not None
        )
        if wants_prompt and asked.control is not False:
            raise ValueError(
                "Log-probabilities of the prompt (`prompt_logprobs`, or `echo` with `logprobs`) are the base's alone: "
                "ask for them with `control` false."
            )

    def is_argmax_invariant(self) -> bool:
        """It changes no logits at all."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each step's forward, with the requests that came, went and moved since the last one."""
        if not self.batch.is_attached:
            raise RuntimeError("The model was loaded without control: `load_format` must be 'recontrol'.")
        self.batch.is_due = True
        if batch_update is not None:
            self.batch.change(
                batch_update.batch_size,
                batch_update.removed,
                [(row, self.heads.read(params.extra_args)) for row, params, *_ in batch_update.added],
                [(here, there, how == MoveDirectionality.SWAP) for here, there, how in batch_update.moved],
            )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, as they are."""
        return logits


class _Heads:
    """Classes of processors, as attributes: vLLM takes a class by the name `module:object.attribute`."""

    @cache  # noqa: B019 (there is one)
    def __getattr__(self, name: str) -> type[ControlProcessor]:
        try:
            served = Served.from_name(name)
        except ValueError as error:
            raise AttributeError(str(error)) from error
        if HAS_TRITON and envs.VLLM_USE_V2_MODEL_RUNNER is not False:
            # vLLM's own words would be about a base class.
            raise ValueError(
                "A controlled model needs vLLM's first model runner: set the environment variable "
                "VLLM_USE_V2_MODEL_RUNNER=0."
            )
        served.heads  # noqa: B018 (loaded now, so that what is wrong with them is said at the start)
        return type("ControlProcessor", (ControlProcessor,), {"served": served, "__module__": __name__})


heads = _Heads()
