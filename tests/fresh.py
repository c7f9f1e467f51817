"""
Fresh processes without the seconds that importing torch takes: forked from one that has imported what transformers
imports, but nothing of Hugging Face, so that each reads its own environment and starts with its own caches.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_PRELOADED = ["torch", "torch._dynamo", "scipy.optimize", "sklearn.metrics", "torchao"]
_READS_ITS_ENVIRONMENT = ("huggingface_hub", "transformers", "accelerate", "hf_recontrol")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


# What the console script `recontrol` does.
RECONTROL = "from hf_recontrol.cli import main\n\nmain()"


def _execute(script: str, arguments: tuple[str, ...], environment: dict[str, str], cwd: str, output: str) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        with open(f"{output}.{name}", "wb", buffering=0) as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    early = [name for name in _READS_ITS_ENVIRONMENT if name in sys.modules]
    assert not early, f"{early} were imported before the process had its environment"
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


class FreshProcess:
    """A script in a fresh process, started; with what of `subprocess.Popen` its tests need."""

    def __init__(self, script: str, arguments: Sequence[str], environment: dict[str, str], cwd: os.PathLike = "."):
        self._folder = tempfile.TemporaryDirectory(prefix="fresh-")
        self._output = os.path.join(self._folder.name, "printed")
        arguments = (script, tuple(map(str, arguments)), dict(environment), os.path.abspath(cwd), self._output)
        self._process = _context.Process(target=_execute, args=arguments)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, and what it said on stderr, when it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a fresh process", timeout)
        # A process that was killed at once has no files.
        files = {name: Path(f"{self._output}.{name}") for name in ("out", "err")}
        out, err = (f.read_text(encoding="utf-8", errors="replace") if f.exists() else "" for f in files.values())
        self._folder.cleanup()
        return out, err


def run_fresh(
    script: str, arguments: Sequence[str], environment: dict[str, str], timeout: float, cwd: os.PathLike = "."
) -> tuple[int, str, str]:
    """Run a script in a fresh process: (exit code, what it printed, what it said on stderr)."""
    process = FreshProcess(script, arguments, environment, cwd)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    return process.returncode, out, err
