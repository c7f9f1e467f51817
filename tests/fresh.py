"""
Fresh processes without the seconds that importing torch takes: forked from one that has imported what transformers
imports, but nothing of Hugging Face, so that each reads its own environment and starts with its own caches.
"""

import multiprocessing
import os
import sys
from pathlib import Path

_PRELOADED = ["torch", "torch._dynamo", "scipy.optimize", "sklearn.metrics", "torchao"]
_READS_ITS_ENVIRONMENT = ("huggingface_hub", "transformers", "accelerate", "hf_recontrol")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


def _execute(script: str, arguments: tuple[str, ...], environment: dict[str, str], output: str) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        with open(f"{output}.{name}", "wb", buffering=0) as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    early = [name for name in _READS_ITS_ENVIRONMENT if name in sys.modules]
    assert not early, f"{early} were imported before the process had its environment"
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


def run_fresh(script: str, arguments: tuple[str, ...], environment: dict[str, str], output: Path, timeout: float):
    """Run a script in a fresh process: (exit code, what it printed, what it said on stderr)."""
    process = _context.Process(target=_execute, args=(script, arguments, environment, str(output)))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"A script ran for more than {timeout} s.")
    texts = [Path(f"{output}.{name}").read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
    return process.exitcode, *texts
