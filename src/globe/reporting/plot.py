"""How every picture looks, and the one function that draws it. Imports matplotlib when called."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from globe.errors import ConfigError

DPI = 220
"""Twice what a page shows, so that pictures stay sharp on screens of high resolution."""
WIDTH = 7.6
"""inches"""
GREY = "#bdbdbd"
# Okabe and Ito's colours, which the colour-blind tell apart, from dark to light; light ones get dark edges
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2, 2, 2, 2, 2)))
_STYLE = {
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
    "text.parse_math": False,  # a dollar sign in the name of a run is one
    "svg.hashsalt": "globe",  # equal runs give equal files
}
DARK = {
    "#ffffff": "#1f1f1f",  # the paper of the page
    "#000000": "#e6e6e6",
    "#222222": "#141414",
    "#e3e3e3": "#3a3a3a",
    "#bdbdbd": "#6f6f6f",
    "#777777": "#9a9a9a",
    "#666666": "#a8a8a8",
    "#444444": "#c4c4c4",
    "#0072b2": "#4d9dff",
    "#d55e00": "#ff8a3d",
    "#009e73": "#2fcc9c",
    "#cc79a7": "#ec9dc5",
    "#8c6d00": "#c9a634",
    "#56b4e9": "#9fdcff",
    "#e69f00": "#ffc94d",
}
"""What each colour of a picture becomes on a dark page."""
ON_LIGHT, ON_DARK = "#010101", "#fefefe"
"""Colours of what stands on the colours of a map, which stay as they are on a dark page."""
_LETTER, _HANDLE = 4.5, 46.0
"""Points that a letter of a legend, and the line before it, take."""
_LONGEST_LINE = 110


@dataclass(frozen=True, slots=True)
class Picture:
    name: str
    """file name without the ending"""
    title: str
    caption: str
    png: bytes
    svg: bytes

    @property
    def width(self) -> int:
        """Pixels that the picture takes on a page: half of those it has."""
        return int.from_bytes(self.png[16:20], "big") // 2


def require_matplotlib() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "globe.report draws with matplotlib, which is not installed: pip install 'globe-moe[report]'"
        ) from error


def picture(
    name: str,
    title: str,
    caption: str,
    make: Callable[[Any, Any], None],
    *,
    rows: int = 1,
    columns: int = 1,
    height: float = 3.6,
    greys: bool = False,
    **shared: Any,
) -> Picture:
    """Return a figure of rows x columns axes, filled by `make(figure, axes)`; `height` is that of one row, in inches.

    `shared` goes to matplotlib's `subplots`. Nothing that is drawn outside the axes is cut off. On a dark page the SVG
    is dark, its maps too where they are of `greys`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks: they become boxes
        figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
        make(figure, figure.subplots(rows, columns, squeeze=False, **shared))
        return Picture(
            name, title, caption, _saved(figure, "png"), with_dark_form(_saved(figure, "svg"), greys)
        )


def _saved(figure: Any, form: str) -> bytes:
    buffer = io.BytesIO()
    # without the date and the version of matplotlib equal runs give equal files
    without: dict[str, Any] = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
    figure.savefig(buffer, format=form, dpi=DPI, metadata=without, bbox_inches="tight", pad_inches=0.06)
    return buffer.getvalue()


def with_dark_form(svg: bytes, greys: bool) -> bytes:
    """Return the picture with a style sheet that replaces each of its colours where the reader prefers dark pages."""
    rules = [f"svg{{fill:{DARK['#000000']}}}"]  # matplotlib leaves black, the default, out
    for light, dark in DARK.items():
        rules += [f'[style*="{what}: {light}"]{{{what}:{dark}!important}}' for what in ("fill", "stroke")]
    if greys:
        rules.append("image{filter:invert(.8784)}")  # white becomes the paper
    sheet = f"@media (prefers-color-scheme:dark){{{''.join(rules)}}}</style>"
    return svg.replace(b"</style>", sheet.encode(), 1)


def series_style(index: int) -> dict[str, Any]:
    """Return colour, marker and line of a series: no two of the first eight share any colour or marker."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
        "markeredgecolor": "#222222",
        "markeredgewidth": 0.5,
    }


def few_markers(index: int, length: int) -> tuple[int, int]:
    """Return `markevery` of a curve: about eight markers, at other places than those of the series before.

    Curves that lie on each other all show by this.
    """
    every = max(1, length // 8)
    return (index * max(1, every // 4)) % every, every


def legend_below(figure: Any, axes: Any) -> None:
    """Put one legend under the whole figure, in as many columns as its labels leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    lines = ["\n".join(textwrap.wrap(label, _LONGEST_LINE)) for label in labels]
    longest = max(len(part) for line in lines for part in line.split("\n"))
    columns = max(1, min(4, len(lines), int(72 * WIDTH / (_LETTER * longest + _HANDLE))))
    figure.legend(handles, lines, loc="outside lower center", ncols=columns, handlelength=3.2)


def scale_axis(axis: Any, scale: str) -> None:
    """Make an axis linear or logarithmic, with plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if scale == "log":
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """Return limits of an axis with some room around the values, also around a single one."""
    low, high = min(values), max(values)
    room = share * (high - low) or share * abs(high) or 1.0
    return low - room, high + room


def gaps(values: Sequence[float | None]) -> list[float]:
    """Return the same numbers with NaN, which a line leaves out, for what is missing."""
    return [math.nan if value is None else value for value in values]
