"""What a head is ([`ValueHeadConfig`]), how it is applied ([`ControlConfig`]), how made ([`TrainingRecord`])."""

from .control import ControlConfig
from .head import FORMAT_VERSION, ValueHeadConfig
from .record import TrainingRecord

__all__ = ["FORMAT_VERSION", "ControlConfig", "TrainingRecord", "ValueHeadConfig"]
