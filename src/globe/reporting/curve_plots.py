"""Pictures of fits as they go on: the error by time and by step, and what is set from outside at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from globe.reporting.front import Track
from globe.reporting.labels import SUPPORT
from globe.reporting.plot import GREY, Picture, few_markers, gaps, legend_below, padded, picture, series_style
from globe.reporting.run_files import Trace
from globe.reporting.runs import ReportRun
from globe.runs.chart_data import spread_out

_SCHEDULES = (
    ("temperature", "temperature T"),
    ("lam", "homotopy lam"),
    ("beta", "blending beta"),
    ("support_median", "median support\n(atoms per expert)"),
)


def convergence(runs: Sequence[ReportRun], chosen: Sequence[Track]) -> Picture:
    """Return RelFrob of every bank by the wall clock and by the steps of its fit; those not chosen are grey."""
    named = {(one.run.number, one.bank.key) for one in chosen}
    sides = (("seconds", "wall-clock time of the fit (s)"), ("step", "step"))

    def make(figure: Any, axes: Any) -> None:
        for plot, (unit, label) in zip(axes[0], sides, strict=True):
            for run in runs:
                for key, trace in run.traces.items():
                    if (run.number, key) not in named:
                        plot.plot(*_curve(run, key, trace, unit), color=GREY, linewidth=0.7, zorder=1)
            for index, one in enumerate(chosen):
                if one.bank.key in one.run.traces:
                    xs, ys = _curve(one.run, one.bank.key, one.run.traces[one.bank.key], unit)
                    plot.plot(
                        xs, ys, label=one.label, markevery=few_markers(index, len(xs)), **series_style(index)
                    )
            plot.set_xlabel(label)
        axes[0, 0].set_ylabel("RelFrob (relative Frobenius error)")
        legend_below(figure, axes[0, 0])

    total = sum(len(run.traces) for run in runs)
    others = f" The {total - len(named)} others are grey." if total > len(named) else ""
    if any(run.options.get(SUPPORT) is not None for run in runs):
        others += " It rises where codes are dropped to bring the support to its target."
    return picture(
        "fig-convergence",
        "Convergence",
        "Error of the fit, before pruning and export, by time on the left and by steps on the right; 0 is the warm "
        f"start.{others}",
        make,
        columns=2,
        height=4.4,
        sharey=True,
    )


def _curve(run: ReportRun, key: str, trace: Trace, unit: str) -> tuple[list[float], list[float]]:
    """Return a bank's curve, from the warm start if that is known."""
    xs, ys = gaps(getattr(trace, unit)), gaps(trace.relfrob)
    banks = () if run.summary is None else run.summary.banks
    start = next((bank.relfrob_start for bank in banks if bank.key == key), None)
    return ([0.0, *xs], [start, *ys]) if start is not None else (xs, ys)


def distinct_schedules(everything: Sequence[Track], count: int) -> list[Track]:
    """Return one track for every course of T, lam and beta that there is, at most `count` of them."""
    first: dict[tuple[Any, ...], Track] = {}
    for one in everything:
        if trace := one.run.traces.get(one.bank.key):
            first.setdefault((trace.temperature, trace.lam, trace.beta), one)
    found = list(first.values())
    return [found[at] for at in spread_out(len(found), count)]


def constant_schedules(chosen: Sequence[Track]) -> list[str]:
    """Return `beta = 1` for each of the schedules that has one value in all of the chosen fits."""
    return [
        f"{name} = {next(iter(values)):g}"
        for name, _ in _SCHEDULES[:-1]
        if len(values := _values(chosen, name)) == 1
    ]


def trajectories(chosen: Sequence[Track]) -> Picture | None:
    """Return T, lam, beta and the support by step, of those what moves or differs; None if no schedule does."""
    if len(constant_schedules(chosen)) == len(_SCHEDULES) - 1:
        return None
    moving = [(name, title) for name, title in _SCHEDULES if len(_values(chosen, name)) > 1]
    if not moving:
        return None

    def make(figure: Any, axes: Any) -> None:
        for row, (name, title) in enumerate(moving):
            plot = axes[row, 0]
            for index, one in enumerate(chosen):
                if trace := one.run.traces.get(one.bank.key):
                    ys = gaps(getattr(trace, name))
                    marks = few_markers(index, len(ys))
                    plot.plot(gaps(trace.step), ys, label=one.label, markevery=marks, **series_style(index))
            plot.set_ylabel(title)
            if name in ("lam", "beta"):
                plot.set_ylim(-0.05, 1.05)
            else:
                plot.set_ylim(*padded(sorted(_values(chosen, name))))
        axes[-1, 0].set_xlabel("step")
        legend_below(figure, axes[0, 0])

    return picture(
        "fig-schedules",
        "Schedules",
        "What is set from outside the step, and what it does to the support. Of fits with the same T, lam and beta "
        "throughout, one is drawn.",
        make,
        rows=len(moving),
        height=1.9 if len(moving) > 1 else 3.0,
        sharex=True,
    )


def _values(chosen: Sequence[Track], name: str) -> set[float]:
    traces = [one.run.traces[one.bank.key] for one in chosen if one.bank.key in one.run.traces]
    return {value for trace in traces for value in getattr(trace, name) if value is not None}
