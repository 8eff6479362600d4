"""Tables for people; numbers are right-aligned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 200
"""Columns where stdout is no terminal: rows are never cut for a file or a pipe."""


def print_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, compact: bool = False
) -> None:
    """Print `rows` below `header`; the first column is text, the others are values.

    A compact table has no lines between columns, so that more of them fit.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if compact else box.HEAVY_HEAD,
        pad_edge=not compact,
        show_edge=not compact,
        padding=(0, 1, 0, 0) if compact else (0, 1),
    )
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def width() -> int:
    """Columns that a table may take."""
    return _console().width


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDE)
