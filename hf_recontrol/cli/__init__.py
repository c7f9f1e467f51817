"""The command `recontrol`."""

from . import heads, stages  # the commands
from .app import app, main

__all__ = ["app", "heads", "main", "stages"]
