"""Tables and sentences on the terminal, alike in every command; what comes from a file is never markup there."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from globe.errors import printable


def wide_console(console: Console | None = None, width: int = 120) -> Console:
    """Return the console, or a new one, with lines of at least `width` columns where there is no terminal."""
    console = console or Console()
    if not console.is_terminal and console.width < width:
        return Console(file=console.file, width=width)
    return console


def new_table(
    title: str, headings: Sequence[str], *, left: Collection[str] = (), wrap: Collection[str] = ()
) -> Table:
    """Return a table without rows: the first column and those named in `left` are aligned left, the others right.

    Columns break no lines but those named in `wrap`.
    """
    table = Table(title=Text(printable(title)), title_justify="left")
    for at, heading in enumerate(headings):
        to_left = at == 0 or heading in left
        justify: JustifyMethod = "left" if to_left else "right"
        table.add_column(Text(heading), justify=justify, no_wrap=heading not in wrap, overflow="fold")
    return table


def add_row(table: Table, cells: Sequence[str], style: str | None = None) -> None:
    """Add a row of texts, which are shown as they are."""
    table.add_row(*(Text(printable(cell)) for cell in cells), style=style)


def say(console: Console, line: str) -> None:
    """Print one line of any length, as it is."""
    console.print(Text(printable(line)), soft_wrap=True, highlight=False)
