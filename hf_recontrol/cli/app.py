"""The command `recontrol` itself: its help, its version, how it shows errors."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .._version import __version__

# Columns in which each option's name, type and text find room.
_WIDE = 120
# What typer makes of Ctrl-C.
_INTERRUPTED = 130
_DEBUG = "RECONTROL_DEBUG"
# Errors whose text alone says what was wrong.
_PLAIN = (OSError, ValueError, ImportError, FloatingPointError)

app = typer.Typer(
    name="recontrol",
    no_args_is_help=True,
    add_completion=False,
    # In a narrow terminal rich cuts the names of options off.
    rich_markup_mode="markdown" if shutil.get_terminal_size().columns >= _WIDE else None,
    pretty_exceptions_enable=False,
    help="""Align a language model while it generates.

**fit** goes from prompts and a reward to a head in one line. Its stages also stand alone: **rollout** (sample
responses), **label** (score them), **states** (read hidden states), **train** (fit the head); each reads the folder of
the one before, resumes where it was stopped, and shares its work between the processes of `accelerate launch`. Then
**generate** under the head's control, **trace** what it does to an answer, and **compare** it with the base,
prompting, best-of-n and more. **chat** in the terminal, or **serve** an OpenAI-compatible API. **demo** does most of
it on a small model.""",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_recontrol {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help=f"Show tracebacks of errors. May stand anywhere; {_DEBUG}=1 does the same."),
    ] = False,
) -> None:
    pass


def print_json(values: dict) -> None:
    """Show values on standard output."""
    typer.echo(json.dumps(values, indent=2))


def own_command() -> str:
    """This command as others may see it: of whole paths only the names, and no secrets."""
    words, shown = iter(sys.argv[1:]), ["recontrol"]
    for word in words:
        if word == "--token":
            next(words, None)
        elif not word.startswith("--token="):
            # Also of `--option=/path` and `-o/path`.
            option, value = re.fullmatch(r"(--[\w-]+=|-\w)?(.*)", word, re.DOTALL).groups(default="")
            shown.append(option + Path(value).name if os.path.isabs(value) else word)
    return shlex.join(shown)


def is_main_process() -> bool:
    """Whether this is the process that speaks for all of `accelerate launch`."""
    from ..data.processes import Processes

    return Processes().index == 0


def _wants_debug() -> bool:
    """Whether tracebacks are asked for. `--debug` is taken off the command's words, wherever it stands."""
    options = sys.argv[: sys.argv.index("--")] if "--" in sys.argv else sys.argv
    if "--debug" in options:
        sys.argv.remove("--debug")
        return True
    return os.environ.get(_DEBUG, "0") not in ("", "0")


def _described(error: Exception) -> str:
    """What an error says; of one in somebody else's function also where it was."""
    text = str(error)
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        frames = traceback.extract_tb(error.__cause__.__traceback__)[-1:]
        return text + "".join(f" ({frame.filename}, line {frame.lineno}, in {frame.name})" for frame in frames)
    return text if text and isinstance(error, _PLAIN) else f"{type(error).__name__}{text and f': {text}'}"


def main() -> None:
    """Entry point: an error is told without a traceback, unless that is asked for, with exit code 1."""
    if int(os.environ.get("RANK", "0")) > 0:
        # The first process says it for all.
        logging.getLogger("hf_recontrol").setLevel(logging.ERROR)
    with suppress(AttributeError):  # not what a console or a file gives
        # An answer may hold what the encoding of a console lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    debug = _wants_debug()
    try:
        app()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            typer.echo("recontrol: interrupted. Run the same command again to resume.", err=True)
        raise
    except Exception as error:
        if debug:
            raise
        typer.echo(f"recontrol: {_described(error)}", err=True)
        typer.echo(f"Rerun with --debug (or {_DEBUG}=1) for the traceback.", err=True)
        sys.exit(1)
