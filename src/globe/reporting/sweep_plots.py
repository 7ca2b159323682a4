"""Pictures of a whole sweep: fronts, error against support, curves by time, schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from globe.reporting.front import Track, coordinates, pareto
from globe.reporting.labels import group_of, methods_of, option_text, short_names
from globe.reporting.runs import ReportRun, Trace
from globe.reporting.style import GREY, Picture, draw, few_markers, gaps, legend_below, padded, series_style
from globe.runs.chart_data import spread_out

_SUPPORT = "codes.target_support"
_MOST_SERIES = 12
_SCHEDULES = (
    ("temperature", "temperature T"),
    ("lam", "homotopy lam"),
    ("beta", "blending beta"),
    ("support_median", "median support\n(atoms per expert)"),
)
_LINE, _LABEL = 11.0, 24.0
"""Height and width of a run's number beside a front, in points of type."""


def error_front(runs: Sequence[ReportRun]) -> Picture:
    """RelFrob against the kept share of the compressed families; one series per group and method."""
    series: dict[str, list[ReportRun]] = {}
    several = len({group_of(run) for run in runs}) > 1
    for run in runs:
        name = f"{group_of(run)}, {methods_of(run)}" if several else methods_of(run)
        series.setdefault(name, []).append(run)

    groups = {name: [run for run in runs if group_of(run) == name] for name in map(group_of, runs)}
    fronts = {
        name: [members[at] for at in pareto([coordinates(run) for run in members])]
        for name, members in groups.items()
    }
    best = {run.number for members in fronts.values() for run in members}

    def make(figure: Any, axes: Any) -> None:
        plot = axes[0, 0]
        for index, (name, members) in enumerate(series.items()):
            style = series_style(index) | {"linestyle": "none"}
            points = [(100 * x, y, run.number) for run in members for x, y in [coordinates(run)]]
            _points(plot, points, best, style, f"{name} ({len(members)})")
        for members in fronts.values():
            _draw_front(plot, [(run.number, 100 * x, y) for run in members for x, y in [coordinates(run)]])
        if max(coordinates(run)[0] for run in runs) > 1:
            plot.axvline(100, color="#666666", linestyle=(0, (1, 2)), linewidth=1, label="no compression")
        plot.set_xlabel("kept parameters of the compressed families (%)")
        plot.set_ylabel("RelFrob (relative Frobenius error)")
        legend_below(figure, plot, columns=1 if several else 3)

    return Picture(
        "fig-front",
        "Error against size",
        "RelFrob of every run against what it keeps; lower left is better. The line joins the Pareto front, whose "
        "runs are filled and carry their numbers.",
        draw(make, height=4.0),
    )


def perplexity_front(runs: Sequence[ReportRun]) -> Picture:
    """What the patched model loses against the kept share of the whole model; one series per text.

    The rise over the original with its paired interval, where every run was measured beside it, or else perplexity.
    """
    series: dict[str, list[ReportRun]] = {}
    for run in runs:
        assert run.quality is not None
        series.setdefault(run.quality.text, []).append(run)
    paired = all(run.quality is not None and run.quality.rise is not None for run in runs)

    def make(figure: Any, axes: Any) -> None:
        plot = axes[0, 0]
        for index, (text, members) in enumerate(series.items()):
            points = [(run.number, *_perplexity_point(run, paired=paired)) for run in members]
            best = [points[at] for at in pareto([(x, y) for _, x, y, _, _ in points])]
            for _, x, _, low, high in points:
                if low is not None and high is not None:
                    plot.plot([x, x], [low, high], color=GREY, linewidth=1)
            style = series_style(index) | {"linestyle": "none"}
            chosen = {number for number, *_ in best}
            _points(plot, [(x, y, number) for number, x, y, _, _ in points], chosen, style, text)
            _draw_front(plot, [(number, x, y) for number, x, y, _, _ in best])
            originals = {run.quality.original for run in members if run.quality is not None} - {None}
            for before in {0.0} if paired else originals:
                plot.axhline(
                    before, color="#444444", linestyle=(0, (2, 3)), linewidth=1, label="the original"
                )
        plot.set_xlabel("kept parameters of the whole model (%)")
        plot.set_ylabel("rise of perplexity over the original (%)" if paired else "perplexity per token")
        legend_below(figure, plot, columns=1 if len(series) > 1 else 2)

    what = "Rise of the perplexity of the patched model over the original's" if paired else "Perplexity"
    return Picture(
        "fig-perplexity",
        "Perplexity against size",
        f"{what} against what the whole model keeps; lower left is better. Grey bars are bootstrap intervals"
        f"{', paired by windows of the text' if paired else ''}. The line joins the Pareto front.",
        draw(make, height=4.0),
    )


def _perplexity_point(run: ReportRun, *, paired: bool) -> tuple[float, float, float | None, float | None]:
    """Kept percent, the figure, and the ends of its interval."""
    quality, summary = run.quality, run.summary
    assert quality is not None
    assert summary is not None
    kept = 100 * (quality.kept_model if quality.kept_model is not None else summary.kept_model())
    if not paired or quality.rise is None:
        return kept, quality.perplexity, quality.low, quality.high
    rise, low, high = (None if value is None else 100 * value for value in quality.rise)
    assert rise is not None
    return kept, rise, low, high


def _points(
    plot: Any, points: Sequence[tuple[float, float, int]], best: set[int], style: dict[str, Any], name: str
) -> None:
    """Filled where the run is on a front, hollow where it is not."""
    hollow = style | {"markerfacecolor": "none", "markeredgecolor": style["color"], "markeredgewidth": 1.0}
    for kind, inside in ((hollow, False), (style, True)):
        chosen = [(x, y) for x, y, number in points if (number in best) is inside]
        own = name if inside or not any(number in best for *_, number in points) else None
        if chosen:
            plot.plot(*zip(*chosen, strict=True), label=own, **kind)


def _draw_front(plot: Any, points: Sequence[tuple[int, float, float]]) -> None:
    """Steps between the points of a front, and the number of each run beside it."""
    xs, ys = [x for _, x, _ in points], [y for *_, y in points]
    plot.plot(xs, ys, drawstyle="steps-post", color="#444444", linewidth=1, zorder=1)
    plot.margins(x=0.06, y=0.1)  # room for the numbers
    plot.autoscale_view()
    scale = 72 / plot.figure.dpi
    places = [tuple(scale * one for one in plot.transData.transform((x, y))) for _, x, y in points]
    for (number, x, y), drop in zip(points, label_drops(places), strict=True):
        plot.annotate(
            f"#{number}", (x, y), textcoords="offset points", xytext=(-4, drop), fontsize=8, ha="right"
        )


def label_drops(places: Sequence[tuple[float, float]]) -> list[float]:
    """How far below its point each label goes, in points of type, so that none covers one before it."""
    taken: list[tuple[float, float]] = []
    drops = []
    for x, y in places:
        drop = -_LINE
        while any(abs(x - left) < _LABEL and abs(y + drop - low) < _LINE for left, low in taken):
            drop -= 1
        taken.append((x, y + drop))
        drops.append(drop)
    return drops


def support_series(
    runs: Sequence[ReportRun], varied: Sequence[str]
) -> dict[str, list[tuple[float, float, int]]]:
    """(median support, RelFrob, number) of runs that differ in their support alone, by what they share."""
    others = [name for name in varied if name != _SUPPORT]
    short = short_names(varied)
    series: dict[str, list[tuple[float, float, int]]] = {}
    for run in runs:
        if run.support_median is None or run.summary is None:
            continue
        same = " ".join(f"{short[name]}={option_text(name, run.options.get(name))}" for name in others)
        point = (run.support_median, run.summary.relfrob, run.number)
        series.setdefault(same or group_of(run), []).append(point)
    return {name: sorted(points) for name, points in series.items()}


def error_by_support(series: dict[str, list[tuple[float, float, int]]]) -> Picture:
    """RelFrob against the median support; runs that differ in their support alone are joined."""
    ranked = sorted(series, key=lambda name: (len(series[name]) < 2, min(y for _, y, _ in series[name])))
    named = [name for name in series if name in set(ranked[:_MOST_SERIES])]

    def make(figure: Any, axes: Any) -> None:
        plot = axes[0, 0]
        for name, points in series.items():
            if name not in named:
                plot.plot(*_xy(points), color=GREY, marker=".", linewidth=0.8, zorder=1)
        for index, name in enumerate(named):
            plot.plot(*_xy(series[name]), label=name, **series_style(index))
        plot.set_xlabel("median support (atoms per expert)")
        plot.set_ylabel("RelFrob (relative Frobenius error)")
        legend_below(figure, plot, columns=3)

    left = len(series) - len(named)
    rest = f" {left} further series are grey." if left else ""
    return Picture(
        "fig-support",
        "Error against support",
        f"What sparse codes cost: lines join runs that differ in their support alone.{rest}",
        draw(make, height=4.0),
    )


def _xy(points: Sequence[tuple[float, float, int]]) -> tuple[list[float], list[float]]:
    return [x for x, _, _ in points], [y for _, y, _ in points]


def convergence(runs: Sequence[ReportRun], chosen: Sequence[Track]) -> Picture:
    """RelFrob of every bank by the wall clock of its fit; the chosen ones named, the others grey."""
    named = {(one.run.number, one.bank.key) for one in chosen}

    def make(figure: Any, axes: Any) -> None:
        plot = axes[0, 0]
        for run in runs:
            for key, trace in run.traces.items():
                if (run.number, key) not in named:
                    plot.plot(*_curve(run, key, trace), color=GREY, linewidth=0.7, zorder=1)
        for index, one in enumerate(chosen):
            if one.bank.key in one.run.traces:
                xs, ys = _curve(one.run, one.bank.key, one.run.traces[one.bank.key])
                marks = few_markers(index, len(xs))
                plot.plot(xs, ys, label=one.label, markevery=marks, **series_style(index))
        plot.set_xlabel("wall-clock time of the fit (s)")
        plot.set_ylabel("RelFrob (relative Frobenius error)")
        legend_below(figure, plot)

    total = sum(len(run.traces) for run in runs)
    others = f" The {total - len(named)} others are grey." if total > len(named) else ""
    if any(run.options.get(_SUPPORT) is not None for run in runs):
        others += " It rises where codes are dropped to bring the support to its target."
    return Picture(
        "fig-convergence",
        "Convergence",
        f"Error of the fit, before pruning and export, by time; 0 s is the warm start.{others}",
        draw(make, height=4.4),
    )


def _curve(run: ReportRun, key: str, trace: Trace) -> tuple[list[float], list[float]]:
    """A bank's curve, from the warm start if that is known."""
    xs, ys = gaps(trace.seconds), gaps(trace.relfrob)
    banks = () if run.summary is None else run.summary.banks
    start = next((bank.relfrob_start for bank in banks if bank.key == key), None)
    return ([0.0, *xs], [start, *ys]) if start is not None else (xs, ys)


def distinct_schedules(everything: Sequence[Track], count: int) -> list[Track]:
    """One track for every course of T, lam and beta that there is, at most `count` of them."""
    first: dict[tuple[Any, ...], Track] = {}
    for one in everything:
        if trace := one.run.traces.get(one.bank.key):
            first.setdefault((trace.temperature, trace.lam, trace.beta), one)
    found = list(first.values())
    return [found[at] for at in spread_out(len(found), count)]


def constant_schedules(chosen: Sequence[Track]) -> list[str]:
    """`beta = 1` for each of the schedules that has one value in all of the chosen fits."""
    return [
        f"{name} = {next(iter(values)):g}"
        for name, _ in _SCHEDULES[:-1]
        if len(values := _values(chosen, name)) == 1
    ]


def trajectories(chosen: Sequence[Track]) -> Picture | None:
    """T, lam, beta and the support by step; only what moves or differs. None if no schedule does."""
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

    return Picture(
        "fig-schedules",
        "Schedules",
        "What is set from outside the step, and what it does to the support. Of fits with the same T, lam and beta "
        "throughout, one is drawn.",
        draw(make, rows=len(moving), height=1.9 if len(moving) > 1 else 3.0, sharex=True),
    )


def _values(chosen: Sequence[Track], name: str) -> set[float]:
    traces = [one.run.traces[one.bank.key] for one in chosen if one.bank.key in one.run.traces]
    return {value for trace in traces for value in getattr(trace, name) if value is not None}
