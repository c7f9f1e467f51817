"""What every vLLM that starts beside this package runs."""

LOAD_FORMAT = "recontrol"


def register() -> None:
    """Make the load format `recontrol` known to vLLM. A vLLM that serves a plain model is left as it is."""
    from vllm.model_executor import model_loader

    formats = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    if LOAD_FORMAT in formats:
        return
    from .loader import ReControlLoader

    model_loader.register_model_loader(LOAD_FORMAT)(ReControlLoader)
