"""Tables and sentences on the terminal, alike in every command; what comes from a file is never markup there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Column, Table
from rich.text import Text
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

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


def show_table(console: Console, table: Table) -> None:
    """Print a table whole: on a terminal that is too narrow for it without its frame, and past the edge if need be."""
    widths = sum(_width(column) for column in table.columns)
    needed = widths + 3 * len(table.columns) + 1
    if needed > console.width and console.is_terminal:
        table.box, table.padding, table.show_edge = box.SIMPLE_HEAD, (0, 0), False
        needed = widths + len(table.columns) - 1
    if needed > console.width:
        colours: Any = console.color_system
        terminal = console.is_terminal or None
        console = Console(file=console.file, width=needed, force_terminal=terminal, color_system=colours)
    console.print(table, soft_wrap=False, crop=False)


def _width(column: Column) -> int:
    """Return the columns of a terminal that a column of a table takes at least."""
    texts = [str(cell) for cell in (column.header, *column.cells)]
    pieces = [piece for text in texts for piece in (text.splitlines() if column.no_wrap else text.split())]
    return max((cell_len(piece) for piece in pieces), default=0)


@contextmanager
def progress_bar(total: int, unit: str, what: str | None = None) -> Iterator[tqdm]:
    """Yield a bar that counts to `total`; without a terminal it is silent. Log lines go above it."""
    # Hydra's console handler keeps the stream it was made with, so that its lines would land on the bar
    with (
        logging_redirect_tqdm(),
        tqdm(total=total, unit=unit, desc=what, disable=None, dynamic_ncols=True, leave=False) as bar,
    ):
        yield bar


def say(console: Console, line: str) -> None:
    """Print one line of any length, as it is."""
    console.print(Text(printable(line)), soft_wrap=True, highlight=False)
