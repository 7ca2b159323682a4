"""The runs of a sweep side by side, in one table at its end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from globe.config.console import add_row, new_table, say, show_table, wide_console
from globe.runs.summary import BankReport, RunSummary, median_support, read_summary

_MOST_ROWS = 200


def print_comparison(sweep: Path) -> None:
    """Print sizes, kept share, error, support and time of every run in the folder, the smallest error in bold.

    Below it stands what to type next. Nothing is printed for fewer than two runs.
    """
    found = {file.parent.name: read_summary(file) for file in sorted(sweep.glob("*/summary.json"))}
    runs = {name: one for name, one in found.items() if one is not None and one.banks}
    if len(runs) < 2:
        return
    best = min(runs, key=lambda name: runs[name].relfrob)
    low_rank = any(bank.atom_rank is not None for run in runs.values() for bank in run.banks)
    rounded = any(run.rounded for run in runs.values())
    headings = [
        "run",
        "banks",
        "m",
        "r",
        *(["k"] if low_rank else []),
        "kept",
        *(["bits"] if rounded else []),
        "RelFrob",
        "MSE_F",
        "support",
        "seconds",
    ]
    table = new_table(f"{sweep}: {len(runs)} runs", headings)
    short = short_names(list(runs))
    for name, run in sorted(runs.items(), key=lambda one: one[1].relfrob)[:_MOST_ROWS]:
        mse = run.mse()["mean"]
        cells = [
            short[name],
            str(len(run.banks)),
            _sizes(run, "m"),
            _sizes(run, "r"),
            *([_sizes(run, "atom_rank")] if low_rank else []),
            f"{run.kept:.1%}",
            *([f"{run.bits:.2f}"] if rounded else []),
            f"{run.relfrob:.4f}",
            "-" if mse is None else f"{mse:.3e}",
            f"{median_support(run):g}",
            f"{sum(one.seconds for one in run.runtimes.values()):.1f}",
        ]
        add_row(table, cells, "bold" if name == best else None)
    console = wide_console()
    show_table(console, table)
    if len(runs) > _MOST_ROWS:
        say(console, f"and {len(runs) - _MOST_ROWS} more with larger errors")
    say(console, f"smallest error: {_shown(sweep / best)}")
    say(console, f"next: python -m globe.report sweep={_shown(sweep)}")


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """Return for the folder of each run the parts of its name in which the runs differ, without its identity.

    Folders that would be called alike keep their whole names.
    """
    words = {name: name.split("_")[:-1] for name in folders}
    common = set.intersection(*map(set, words.values())) if words else set()
    short = {name: "_".join(word for word in words[name] if word not in common) for name in words}
    counts = Counter(short.values())
    return {name: text if text and counts[text] == 1 else name for name, text in short.items()}


def _sizes(run: RunSummary, size: str) -> str:
    """Return a size that all banks have, or the smallest and the largest."""
    values = sorted({_value(bank, size) for bank in run.banks})
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g}-{values[-1]:g}"


def _value(bank: BankReport, size: str) -> float:
    return float(getattr(bank, size) or 0)


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
