"""The command `recontrol`."""

from . import evaluation, heads, stages  # the commands
from .app import app, main

__all__ = ["app", "evaluation", "heads", "main", "stages"]
