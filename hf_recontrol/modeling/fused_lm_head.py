"""
Control where a trainer reads the LM head's weight instead of calling the LM head.

TRL's trainers replace a model's `forward`: called with `fused_lm_head=True` it runs the backbone and multiplies its
output by the weight itself, in tiles. A head at the LM head's input would never be reached there, so it acts on the
backbone's output, which is that input.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

from .hook_points import find_lm_head, uses_its_weight

if TYPE_CHECKING:
    from .causal_lm import ReControlForCausalLM


def _is_fused(forward: Any) -> bool:
    # TRL hides the argument behind the signature of the model's own forward.
    return isinstance(forward, MethodType) and (
        "fused_lm_head" in inspect.signature(forward.__func__, follow_wrapped=False).parameters
    )


def controlled_forward(forward: Any) -> Any:
    """A `forward` that TRL gave a model, under control also with `fused_lm_head=True`; any other as it is."""
    if not _is_fused(forward) or hasattr(forward, "unfused"):
        return forward
    fused: Callable = forward.__func__

    @wraps(fused)
    def run(self, *args, fused_lm_head=False, **kwargs):
        hook_point = getattr(self, "hook_point", None)  # a base has none
        if not fused_lm_head or hook_point is None or hook_point.layer is not None:
            return fused(self, *args, fused_lm_head=fused_lm_head, **kwargs)
        lm_head = find_lm_head(self)
        if not uses_its_weight(lm_head):
            raise ValueError(
                f"TRL multiplies by the weight of the LM head, a {type(lm_head).__name__}, but the logits do not come "
                "of that weight alone (an adapter on it, or it is quantised or offloaded): leave the LM head as it "
                "is, and put adapters on other modules."
            )
        with _edit_backbone_output(self):
            return fused(self, *args, fused_lm_head=True, **kwargs)

    run.unfused = fused
    return MethodType(run, forward.__self__)


def original_forward(forward: Any) -> Any:
    """What [`controlled_forward`] was given, or `forward` itself."""
    if not _is_fused(forward) or not hasattr(forward, "unfused"):
        return forward
    return MethodType(forward.unfused, forward.__self__)


@contextmanager
def _edit_backbone_output(model: ReControlForCausalLM) -> Iterator[None]:
    thread = threading.get_ident()

    def edit(backbone, args, output):
        if threading.get_ident() != thread:
            return None
        output.last_hidden_state = model.edit_lm_head_input(output.last_hidden_state)
        return output

    handle = model.base_model.register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()
