"""An OpenAI-compatible server of a controlled model, on transformers' own. All of it needs the extra `serve`."""

from importlib import import_module

from ...utils.extras import needs_extra

with needs_extra("serve", "The server"):
    # transformers' server last: without the others it fails in ways of its own.
    for name in ("fastapi", "openai", "uvicorn", "transformers.cli.serving.server"):
        import_module(name)
