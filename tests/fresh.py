"""
Fresh processes without the seconds that importing torch takes: forked from one that has imported what transformers
imports, but nothing of Hugging Face, so that each reads its own environment and starts with its own caches. Those with
the tests' own environment, as far as Hugging Face's libraries read it, come from one that has imported these, too.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

_PRELOADED = [
    *("torch", "torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.select_algorithm"),
    *("networkx", "scipy.optimize", "sklearn.metrics", "torchao"),
]
_READS_ITS_ENVIRONMENT = ("huggingface_hub", "transformers", "accelerate", "hf_recontrol")
_VARIABLES = ("ACCELERATE_", "HF_", "HUGGING", "RECONTROL", "TOKENIZERS_", "TRANSFORMERS_", "TORCH", "XDG_")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)
# Its own server: that of multiprocessing is one for the whole process.
_with_libraries = multiprocessing.forkserver.ForkServer()
_with_libraries.set_forkserver_preload(
    [
        *(*_PRELOADED, "transformers.trainer", "transformers.models.llama.modeling_llama", "matplotlib.pyplot"),
        *("hf_recontrol.cli", "hf_recontrol.pipelines.compare", "hf_recontrol.pipelines.fit"),
    ]
)


def _read(environment: Mapping[str, str]) -> dict[str, str]:
    """What libraries read of an environment when they are imported."""
    return {name: value for name, value in environment.items() if name.startswith(_VARIABLES)}


_OWN = _read(os.environ)


@contextmanager
def _from_server(environment: Mapping[str, str], cold: bool) -> Iterator[bool]:
    """Where processes with this environment start from; gives whether libraries are imported there."""
    is_own = _read(environment) == _OWN and not cold
    server = _with_libraries.connect_to_new_process if is_own else multiprocessing.forkserver.connect_to_new_process
    with mock.patch("multiprocessing.forkserver.connect_to_new_process", server):
        yield is_own


# What the console script `recontrol` does.
RECONTROL = "from hf_recontrol.cli import main\n\nmain()"


def _execute(
    script: str,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    cwd: str,
    output: str,
    typed: str,
    is_own: bool,
) -> None:
    source, end = os.pipe()
    os.dup2(source, sys.stdin.fileno())
    with open(end, "w", encoding="utf-8") as file:
        file.write(typed)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        with open(f"{output}.{name}", "wb", buffering=0) as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    early = [name for name in _READS_ITS_ENVIRONMENT if name in sys.modules]
    assert is_own or not early, f"{early} were imported before the process had its environment"
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


class FreshProcess:
    """A script in a fresh process, started; with what of `subprocess.Popen` its tests need."""

    def __init__(
        self,
        script: str,
        arguments: Sequence[str],
        environment: dict[str, str],
        cwd: os.PathLike = ".",
        typed: str = "",
        cold: bool = False,
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="fresh-")
        self._output = os.path.join(self._folder.name, "printed")
        arguments = (script, tuple(map(str, arguments)), dict(environment), os.path.abspath(cwd), self._output, typed)
        with _from_server(environment, cold) as is_own:
            self._process = _context.Process(target=_execute, args=(*arguments, is_own))
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
    script: str,
    arguments: Sequence[str],
    environment: dict[str, str],
    timeout: float,
    cwd: os.PathLike = ".",
    typed: str = "",
    cold: bool = False,
) -> tuple[int, str, str]:
    """
    Run a script in a fresh process, which may read what is `typed`: (exit code, what it printed, what it said on
    stderr). One that is `cold` has imported nothing of Hugging Face, whatever its environment.
    """
    process = FreshProcess(script, arguments, environment, cwd, typed, cold)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    return process.returncode, out, err


def run_script(path: Path, arguments: Sequence[str], timeout: float, cwd: os.PathLike = ".") -> tuple[int, str, str]:
    """Run a file as `python path arguments` does, in a fresh process: as [`run_fresh`]."""
    program = (
        "import runpy, sys\nscript = sys.argv.pop(1)\nsys.path.insert(0, script.rpartition('/')[0])\n"
        "runpy.run_path(script, run_name='__main__')"
    )
    return run_fresh(program, [path, *arguments], os.environ, timeout, cwd)
