"""Control in vLLM's layer from states to logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from ...utils.extras import needs_extra
from .batch import Batch, Kind

with needs_extra("vllm", "Control in vLLM"):
    from vllm.distributed import get_pp_group
    from vllm.model_executor.layers.logits_processor import LogitsProcessor


class ControlledLogits(LogitsProcessor):
    """
    vLLM's `LogitsProcessor`, whose input the heads edit. Its class is given to a loaded layer.

    Each model of vLLM hands this layer what its LM head reads, and gets the logits after its own soft cap and scale:
    what `hook_point="lm_head"` and the guards mean in transformers too. It runs after the model's forward, outside of
    what is compiled and captured. Under tensor parallelism each rank edits the same whole states in the same way,
    before the vocabulary is split; guards act where vLLM gathers the logits.

    Attributes:
        batch ([`Batch`]):
            What its rows ask for.
    """

    batch: Batch
    # Of the rows whose logits are being made.
    _kinds: Sequence[Kind] = ()

    def _get_logits(self, *args, **kwargs) -> torch.Tensor | None:
        """As the LM head makes them, with the heads' token biases; before a soft cap and a scale."""
        logits = super()._get_logits(*args, **kwargs)
        if logits is None:
            return None
        for kind in self._kinds:
            logits = kind.put(logits, self.batch.shift(kind, kind.of(logits)))
        return logits

    def forward(
        self,
        lm_head: nn.Module,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> torch.Tensor | None:
        """Logits `(rows, vocabulary)` of states `(rows, width)`, controlled as the batch asks for."""

        def logits_of(states: torch.Tensor) -> torch.Tensor | None:
            return super(ControlledLogits, self).forward(lm_head, states, embedding_bias, *args, **kwargs)

        kinds = self.batch.take(hidden_states)
        if not kinds:
            return logits_of(hidden_states)
        edited = hidden_states
        for kind in kinds:
            edited = kind.put(edited, self.batch.edit(kind, kind.of(hidden_states)))
        self._kinds = kinds
        try:
            logits = logits_of(edited)
        finally:
            self._kinds = ()
        for kind in kinds:
            if kind.control.is_guarded:
                # A forward of their own: more rows in the first one would move the others' logits by rounding.
                base = logits_of(kind.of(hidden_states))
                if base is not None:
                    logits = kind.put(logits, self.batch.guard(kind, base, kind.of(logits)))
        return logits


@cache
def _controlled(layer: type) -> type:
    return type(layer.__name__, (ControlledLogits, layer), {"__module__": layer.__module__})


def attach(model: nn.Module, batch: Batch, model_config: Any) -> None:
    """
    Put a model of vLLM under control.

    Args:
        model (`nn.Module`):
            A loaded model.
        batch ([`Batch`]):
            What the rows of its logits will ask for.
        model_config (`vllm.config.ModelConfig`):
            Its configuration.

    Raises:
        `ValueError`: if it cannot be controlled.
    """
    if not get_pp_group().is_last_rank:
        # Its states go on to another part of the pipeline.
        batch.is_attached = True
        return
    layers = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    if len(layers) != 1 or layers[0].logits_as_input:
        raise ValueError(
            f"{type(model).__name__} cannot be controlled in vLLM: it should have one layer from states to logits, "
            f"found {len(layers)}."
        )
    width = model_config.get_hidden_size()
    for name, head in batch.controller.heads.items():
        if head.config.hidden_size != width:
            raise ValueError(
                f"The head {name!r} reads states of width {head.config.hidden_size}, {type(model).__name__} has "
                f"{width}: it was made for another base model."
            )
        size = head.config.token_bias_size
        if size is not None and size > layers[0].org_vocab_size:
            raise ValueError(
                f"The token bias of the head {name!r} is of {size} tokens, {type(model).__name__} has "
                f"{layers[0].org_vocab_size}: it was made for another vocabulary."
            )
    (layer,) = layers
    layer.__class__ = _controlled(type(layer))
    layer.batch = batch
    batch.is_attached = True
