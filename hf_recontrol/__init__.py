"""Align a language model while it generates: value heads that steer the hidden states of any decoder-only model."""

from ._version import __version__
from .configuration import ControlConfig, ValueHeadConfig
from .modeling import ReControlForCausalLM
from .value_head import ValueHead

__all__ = ["ControlConfig", "ReControlForCausalLM", "ValueHead", "ValueHeadConfig", "__version__"]
