"""The tables that `fit.py` prints: errors by time, and how much sooner a method has the error of another."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

OURS = ("globe linear", "globe silu", "globe tanh", "globe tanh, low-rank")
THEIRS = (
    "mobe silu",
    "mobe tanh",
    "mobe_corrected silu",
    "mobe_corrected tanh",
    "slbf silu",
    "slbf tanh",
)
SCRIPT = ("mobe_script silu", "mobe_script tanh")  # only with --mobe-script

KINDS = {
    "MoBE": tuple(name for name in (*THEIRS, *SCRIPT) if name.startswith("mobe")),
    "SLBF": tuple(name for name in THEIRS if name.startswith("slbf")),
    "GloBE, dense": tuple(name for name in OURS if "low-rank" not in name),
    "GloBE, low-rank": tuple(name for name in OURS if "low-rank" in name),
}


def best_until(cell: dict[str, Any], seconds: float) -> float:
    return min((error for at, error in cell["history"] if at <= 1.02 * seconds), default=float("nan"))


def number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def table(cells: dict[str, dict[str, Any]], times: list[float]) -> list[str]:
    lines = ["| method | sizes | kept | " + " | ".join(f"{t:g} s" for t in times) + " | rises |"]
    lines.append("|---" * (len(times) + 4) + "|")
    for name, cell in cells.items():
        errors = " | ".join(
            number(best_until(cell, t), 4) if t <= cell.get("seconds", t) else "" for t in times
        )
        lines.append(
            f"| {name} | {cell['sizes']} | {cell['kept']:.4f} | {errors} | {cell.get('rises', '')} |"
        )
        ours = cells.get(name.replace("mobe_script", "globe"))
        if name in SCRIPT and ours is not None:
            ratios = " | ".join(number(best_until(cell, t) / best_until(ours, t), 3) for t in times)
            lines.append(f"| {name}, ratio to globe | | | {ratios} | |")
    return lines


def race(cells: dict[str, dict[str, Any]], peer: str, own: str, seconds: float) -> tuple[float, float] | None:
    """The peer's least error until then, and when one of our forms has it (inf: never); None without both."""
    goal = least(cells, KINDS[peer], seconds)
    ours = [cells[name] for name in KINDS[own] if name in cells]
    if goal is None or not ours:
        return None
    return goal, min(
        (at for cell in ours for at, error in cell["history"] if error <= goal), default=math.inf
    )


def least(cells: dict[str, dict[str, Any]], names: tuple[str, ...], seconds: float) -> float | None:
    """The least error of the named methods until then; None where none was run so long or had one yet."""
    run = [cells[name] for name in names if name in cells]
    errors = [best_until(cell, seconds) for cell in run if seconds <= cell["seconds"]]
    return min((error for error in errors if not math.isnan(error)), default=None)


def speed(cells: dict[str, dict[str, Any]], times: list[float]) -> str:
    """How much sooner GloBE is where MoBE ends, for the best of each at the same (m, r)."""
    found = race(cells, "MoBE", "GloBE, dense", max(times))
    if found is None:
        return ""
    goal, at = found
    if math.isinf(at):
        return f"MoBE's best at {max(times):g} s, {goal:.4f}, is not reached at the same (m, r)."
    return (
        f"MoBE's best at {max(times):g} s, {goal:.4f}, after {at:.1f} s: {max(times) / at:.1f} times sooner."
    )


def overall(banks: list[dict[str, dict[str, Any]]], times: list[float]) -> list[str]:
    """Over all matrices: mean errors, how much sooner GloBE's forms have the peers' last errors, and rises."""
    lines = [
        "| mean RelFrob | " + " | ".join(f"{t:g} s" for t in times) + " |",
        "|---" * (len(times) + 1) + "|",
    ]
    for kind, names in KINDS.items():
        errors = [[least(cells, names, t) for cells in banks] for t in times]
        means = [None if None in column else statistics.mean(filter(None, column)) for column in errors]
        if any(means):
            lines.append(f"| {kind} | " + " | ".join(f"{one:.4f}" if one else "" for one in means) + " |")
    for peer, own in itertools.product(("MoBE", "SLBF"), ("GloBE, dense", "GloBE, low-rank")):
        races = [found for cells in banks if (found := race(cells, peer, own, max(times))) is not None]
        ratios = [max(times) / at for _, at in races if not math.isinf(at)]
        if ratios:
            lines.append(
                f"\n{own}, to {peer}'s error of {max(times):g} s: {min(ratios):.1f} to {max(ratios):.1f} times sooner, "
                f"median {statistics.median(ratios):.1f} ({len(ratios)} of {len(races)} matrices)"
            )
    ours = [cell for cells in banks for name, cell in cells.items() if name.startswith("globe")]
    steps = sum(len(cell["history"]) for cell in ours)
    return [
        *lines,
        f"\nrises of the objective: {sum(cell['rises'] for cell in ours)} in {steps} steps of GloBE",
    ]
