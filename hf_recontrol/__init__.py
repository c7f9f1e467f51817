"""Align a language model while it generates: value heads that steer the hidden states of any decoder-only model."""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .configuration import ControlConfig, ValueHeadConfig
    from .heads.value_head import ValueHead
    from .modeling.causal_lm import ReControlForCausalLM
    from .modeling.logits_processor import ReControlLogitsProcessor

# Imported on first use, as transformers does, so that `import hf_recontrol` does not wait for torch.
_MODULES = {
    "ControlConfig": ".configuration",
    "ReControlForCausalLM": ".modeling.causal_lm",
    "ReControlLogitsProcessor": ".modeling.logits_processor",
    "ValueHead": ".heads.value_head",
    "ValueHeadConfig": ".configuration",
    "vader": ".collection.rewards",
}

__all__ = [
    "ControlConfig",
    "ReControlForCausalLM",
    "ReControlLogitsProcessor",
    "ValueHead",
    "ValueHeadConfig",
    "__version__",
    "vader",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
