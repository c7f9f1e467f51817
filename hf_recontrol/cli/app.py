"""The command `recontrol` itself: its help, its version, how it shows errors."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from .._version import __version__

# What typer makes of Ctrl-C.
_INTERRUPTED = 130

app = typer.Typer(
    name="recontrol",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Align a language model while it generates.

**fit** goes from prompts and a reward to a head in one line. Its stages also stand alone: **rollout** (sample
responses), **label** (score them), **states** (read hidden states), **train** (fit the head); each reads the folder of
the one before, resumes where it was stopped, and shares its work between the processes of `accelerate launch`. Then
**generate** under the head's control. **demo** does all of it on a small model.""",
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
            shown.append(Path(word).name if os.path.isabs(word) else word)
    return shlex.join(shown)


def is_main_process() -> bool:
    """Whether this is the process that speaks for all of `accelerate launch`."""
    from ..data.processes import Processes

    return Processes().index == 0


def main() -> None:
    """Entry point: errors that name what was wrong are shown without a traceback, with exit code 1."""
    if int(os.environ.get("RANK", "0")) > 0:
        # The first process says it for all.
        logging.getLogger("hf_recontrol").setLevel(logging.ERROR)
    try:
        app()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            typer.echo("recontrol: interrupted. Run the same command again to resume.", err=True)
        raise
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        # Somebody else's function failed: where, and in which.
        typer.echo("".join(traceback.format_exception(error.__cause__)), err=True, nl=False)
        typer.echo(f"recontrol: {error}", err=True)
        sys.exit(1)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        typer.echo(f"recontrol: {error}", err=True)
        sys.exit(1)
