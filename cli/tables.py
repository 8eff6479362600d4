"""Tables for people; numbers are right-aligned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WIDE = 200
"""Columns where stdout is no terminal: rows are never cut for a file or a pipe."""


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print `rows` below `header`; the first column is text, the others are values."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    console.print(table)
