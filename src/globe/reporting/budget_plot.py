"""The picture of one budget over many banks: what share each keeps, and what it loses by that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from globe.errors import ConfigError
from globe.files import write_bytes
from globe.reporting.plot import Picture, legend_below, picture, require_matplotlib
from globe.runs.allocation import Allocation

_MOST_NAMES = 48
"""Banks whose names stand under the bars."""


def budget_picture(found: Allocation, name: str = "allocation") -> Picture:
    """Return bars of the share that each bank keeps, over those of its loss beside the loss at equal shares."""
    places = range(len(found.shares))

    def make(figure: Any, axes: Any) -> None:
        above, below = axes[:, 0]
        above.bar(places, [one.kept for one in found.shares], color="#0072B2", width=0.8)
        above.axhline(found.kept, color="#222222", linestyle=(0, (4, 2)), linewidth=1)
        above.set_ylim(0, 1)
        above.set_ylabel("kept (line: equal shares)")
        above.tick_params(labelbottom=False)
        for shift, losses, label, colour in (
            (-0.2, [one.uniform_loss for one in found.shares], "with equal shares", "#bdbdbd"),
            (0.2, [one.loss for one in found.shares], "with these shares", "#D55E00"),
        ):
            below.bar([at + shift for at in places], losses, color=colour, width=0.4, label=label)
        below.set_ylabel("predicted loss, nats" if found.measured else "predicted loss,\nshare of energy")
        below.set_xlabel("bank")
        every = -(-len(found.shares) // _MOST_NAMES)
        shown = list(places)[::every]
        below.set_xticks(shown, [found.shares[at].key for at in shown], rotation=90)
        for plot in (above, below):
            plot.grid(False, axis="x")
        legend_below(figure, below)

    losses, equal = (sum(getattr(one, key) for one in found.shares) for key in ("loss", "uniform_loss"))
    whole = sum(one.kept == 1 for one in found.shares)
    left = f" {whole} of the banks stay as they are." if whole else ""
    return picture(
        name,
        "One budget over all banks",
        f"{found.used:.1%} of all numbers kept; predicted loss {losses:.3g} instead of {equal:.3g}.{left}",
        make,
        rows=2,
        height=2.2,
        sharex="col",
    )


def draw_allocation(found: Allocation, folder: Path) -> None:
    """Draw the shares into `allocation.png` of a run's folder, where matplotlib is installed."""
    try:
        require_matplotlib()
    except ConfigError:
        return
    drawn = budget_picture(found)
    write_bytes(folder / f"{drawn.name}.png", drawn.png)
    print(f"{folder / drawn.name}.png shows the shares")
