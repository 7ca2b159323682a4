"""Pareto fronts, and which runs and banks are worth drawing in detail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from globe.reporting.labels import group_of
from globe.reporting.runs import ReportRun
from globe.runs.chart_data import spread_out
from globe.runs.summary import BankReport, RunSummary

CURVES = 8
"""Runs that are told apart in a picture of curves; the others are grey."""


@dataclass(frozen=True, slots=True)
class Track:
    """One bank of one run."""

    run: ReportRun
    bank: BankReport
    label: str


@dataclass(frozen=True, slots=True)
class SizeAxis:
    """By what the sizes of runs are compared."""

    label: str
    size: Callable[[RunSummary], float]
    whole: float
    """the size of experts that are not compressed"""
    scale: str


KEPT = SizeAxis(
    "kept parameters of the compressed families (%)", lambda summary: 100 * summary.kept, 100, "linear"
)
BITS = SizeAxis("bits a weight of the compressed families", lambda summary: summary.bits, 16, "log")


def size_axis(runs: Sequence[ReportRun]) -> SizeAxis:
    """Return bits a weight where a run has rounded factors, or else the share of parameters that is kept."""
    done = [run.summary for run in runs if run.summary is not None and run.measured]
    return BITS if any(one.rounded for one in done) else KEPT


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the positions of the points that no other beats in one coordinate and equals or beats in the other.

    Both coordinates are better when smaller. The positions are in the order of the first; of equal points the first
    counts.
    """
    order = sorted(range(len(points)), key=lambda at: (*points[at], at))
    best, chosen = float("inf"), []
    for at in order:
        if points[at][1] < best:
            best = points[at][1]
            chosen.append(at)
    return chosen


def fronts(runs: Sequence[ReportRun], measure: str = "relfrob") -> dict[str, list[ReportRun]]:
    """Return the front of a measure against size of every group of comparable runs, by the group's name.

    `measure` is an attribute of runs, RelFrob or KL. A run that keeps more than there was is on no front.
    """
    axis = size_axis(runs)
    groups: dict[str, list[ReportRun]] = {}
    for run in runs:
        if run.measured and run.summary is not None and axis.size(run.summary) <= axis.whole:
            groups.setdefault(group_of(run), []).append(run)
    return {
        name: [members[at] for at in pareto([coordinates(run, axis, measure) for run in members])]
        for name, members in groups.items()
    }


def coordinates(run: ReportRun, axis: SizeAxis, measure: str) -> tuple[float, float]:
    """Return the size of a run, and a measure that it has."""
    assert run.summary is not None
    return axis.size(run.summary), getattr(run, measure)


def highlighted(runs: Sequence[ReportRun], count: int) -> list[ReportRun]:
    """Return at most `count` runs by which to know a sweep: evenly along the fronts, then those of least error."""
    front = [run for members in fronts(runs).values() for run in members]
    chosen = [front[at] for at in spread_out(len(front), count)]
    taken = {run.number for run in chosen}
    rest = sorted(
        (run for run in runs if run.measured and run.number not in taken),
        key=lambda run: (run.relfrob, run.number),
    )
    return sorted([*chosen, *rest[: count - len(chosen)]], key=lambda run: run.number)


def tracks(runs: Sequence[ReportRun], names: Mapping[int, str], count: int) -> list[Track]:
    """Return at most `count` banks of the highlighted runs: one each, or several where the runs are few."""
    chosen = highlighted(runs, count)
    each = max(1, count // max(1, len(chosen)))
    alone = len(runs) == 1
    found = []
    for run in chosen:
        every = all_tracks([run], names, alone=alone)
        found += [every[at] for at in spread_out(len(every), each)]
    return found


def all_tracks(runs: Sequence[ReportRun], names: Mapping[int, str], *, alone: bool) -> list[Track]:
    """Return every bank there is; of a run that is `alone` its own name and number say nothing."""
    found = []
    for run in runs:
        for bank in () if run.summary is None else run.summary.banks:
            name = names[run.number]
            own = bank.key if alone else f"{name} {bank.key}" if run.banks_done > 1 else name
            found.append(Track(run, bank, own))
    return found
