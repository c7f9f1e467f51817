"""The command `recontrol`."""

from . import chat, evaluation, heads, serve, stages  # the commands
from .app import app, main

__all__ = ["app", "chat", "evaluation", "heads", "main", "serve", "stages"]
