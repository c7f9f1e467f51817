"""How far a run of several stages is, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..data.processes import Progress, no_progress


@contextmanager
def display(stages: Sequence[str], quiet: bool, title: str = "") -> Iterator[Callable[[str], Progress | None]]:
    """
    One display with a line for each stage; into a file, each stage's own lines.

    Args:
        stages (sequence of `str`):
            The stages, in their order. One that is not among them gets a line when it begins.
        quiet (`bool`):
            Show nothing.
        title (`str`, *optional*):
            A line above them.

    Returns:
        What gives, for a stage that begins, its `progress`: a function of (done, total), or `None` for its own bar.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda stage: no_progress if quiet else None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description:12}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if title:
        console.print(title)
    with rich_progress.Progress(*columns, console=console) as display:
        tasks = {stage: display.add_task(stage, start=False, total=None) for stage in stages}

        def show(stage: str):
            finish()
            if stage not in tasks:
                tasks[stage] = display.add_task(stage, start=False, total=None)
            display.start_task(tasks[stage])
            return lambda done, total: display.update(tasks[stage], completed=done, total=total)

        def finish():
            """A stage that had nothing to do, since an earlier run has done it, is not left without numbers."""
            for task in display.tasks:
                if task.started and task.total is None:
                    display.update(task.id, completed=1, total=1, description=f"{task.description} (was done)")

        yield show
        finish()
