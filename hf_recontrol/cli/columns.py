"""Texts beside each other in the terminal, each shown as it is drawn."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.box import MINIMAL
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TextStreamer

# Columns of the terminal below which texts stand below each other.
_WIDE = 80
_REFRESHES_PER_SECOND = 8
# Columns that stay free at the right: a terminal writes ^C there, which would begin a line of its own.
_FREE = 3
# What moves a terminal's cursor or changes its colours, as a picture of it: an answer may hold it, a column may not.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def has_room() -> bool:
    """Whether standard output is a terminal in which texts can stand beside each other."""
    console = Console()
    return sys.stdout.isatty() and console.is_interactive and console.width >= _WIDE


class Columns:
    """
    A context in which texts grow beside each other. Behind it they stand in the terminal, whole.

    While texts are higher than the terminal, the lines are shown that the growing one has reached.

    Args:
        names (`str`, several):
            Of the columns, from the left.
    """

    def __init__(self, *names: str):
        self._texts = dict.fromkeys(names, "")
        self._growing: str | None = None
        self._live = Live(self, console=Console(), refresh_per_second=_REFRESHES_PER_SECOND)

    def __enter__(self) -> Columns:
        # What was typed ahead has left the cursor behind the prompt.
        self._live.console.print()
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._growing = None
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        growing, options = self._growing, options.update(width=options.max_width - _FREE)
        lines, room = console.render_lines(_table(self._texts), options), options.size.height
        if growing is not None and len(lines) > room:
            alone = {name: text if name == growing else "" for name, text in self._texts.items()}
            end = max(room, len(console.render_lines(_table(alone), options)))
            lines = lines[end - room : end]
        for line in lines:
            yield from line
            yield Segment.line()

    def add(self, name: str, text: str) -> None:
        """Let a column's text grow."""
        self._growing = name
        self._texts[name] += text.translate(_PICTURES)


def _table(texts: dict[str, str]) -> Table:
    table = Table(box=MINIMAL, expand=True, show_edge=False)
    for name in texts:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*map(Text, texts.values()))
    return table


class ColumnStreamer(TextStreamer):
    """transformers' streamer into a column of [`Columns`]."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Columns, name: str):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._columns, self._name = columns, name

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show what has been drawn since."""
        self._columns.add(self._name, text)
