"""How every picture looks: sizes, series that stay apart in greyscale, PNG bytes. Imports matplotlib when called."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from globe.errors import ConfigError

DPI = 110
WIDTH = 7.6
"""inches"""
# Okabe and Ito's colours, which the colour-blind tell apart, from dark to light; light ones get dark edges
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2, 2, 2, 2, 2)))
GREY = "#bdbdbd"
_TEXT = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Picture:
    name: str
    """file name without the ending"""
    title: str
    caption: str
    png: bytes


def require_matplotlib() -> None:
    """Raises ConfigError if there is none."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "globe.report draws with matplotlib, which is not installed: pip install 'globe-moe[report]'"
        ) from error


def series_style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the index-th series: no two of the first eight share any colour or marker."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
        "markeredgecolor": "#222222",
        "markeredgewidth": 0.5,
    }


def few_markers(index: int, length: int) -> tuple[int, int]:
    """`markevery` for a curve: about eight markers, and others than the series before, so that curves that lie on
    each other all show.
    """
    every = max(1, length // 8)
    return (index * max(1, every // 4)) % every, every


def draw(
    make: Any, *, rows: int = 1, columns: int = 1, width: float = WIDTH, height: float = 3.6, **shared: Any
) -> bytes:
    """A figure of rows x columns axes, filled by `make(figure, axes)`, as PNG; `height` is that of one row, inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_TEXT):
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **shared)
        make(figure, axes)
        buffer = io.BytesIO()
        # without the version of matplotlib equal runs give equal files
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def legend_below(figure: Any, axes: Any, columns: int = 2) -> None:
    """One legend under the whole figure, where it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """Limits of an axis with some room around the values; also around a single one."""
    low, high = min(values), max(values)
    room = share * (high - low) or share * abs(high) or 1.0
    return low - room, high + room


def gaps(values: Sequence[float | None]) -> list[float]:
    """The same numbers with NaN for what is missing, which a line leaves out."""
    return [math.nan if value is None else value for value in values]
