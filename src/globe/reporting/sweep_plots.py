"""Pictures of a whole sweep by its sizes: fronts, maps over sizes, error against support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from globe.reporting.front import KEPT, SizeAxis, coordinates, fronts, pareto, size_axis
from globe.reporting.labels import (
    SEED,
    SUPPORT,
    group_of,
    methods_of,
    settings,
    short_names,
    varied_options,
)
from globe.reporting.plot import (
    GREY,
    ON_DARK,
    ON_LIGHT,
    Picture,
    legend_below,
    picture,
    scale_axis,
    series_style,
)
from globe.reporting.runs import ReportRun

REFERENCES = ("svd", "shared_basis")
"""Methods whose runs are drawn as lines to measure the others by."""
_SIZES = ("bank.m", "bank.r", "bank.atom_rank")
_MOST_SERIES = 12
_MOST_MAPS = 6
_LINE, _LABEL = 11.0, 24.0
"""Height and width of a run's number beside a front, in points of type."""
_RELFROB = "RelFrob (relative Frobenius error)"


def error_front(runs: Sequence[ReportRun]) -> Picture:
    """Return RelFrob against the size of the compressed families."""
    return _front(runs, "relfrob", "fig-front", "Error against size", _RELFROB)


def kl_front(runs: Sequence[ReportRun]) -> Picture:
    """Return the divergence of the patched models, of runs that have one, against the size of the families."""
    return _front(runs, "kl", "fig-kl", "KL against size", "KL (nats)", scale="log")


def _front(
    runs: Sequence[ReportRun], measure: str, name: str, title: str, label: str, *, scale: str = "linear"
) -> Picture:
    """Return a measure of the runs against their size; one series per group and method."""
    axis = size_axis(runs)
    several = len({group_of(run) for run in runs}) > 1
    series: dict[str, list[ReportRun]] = {}
    for run in runs:
        text = f"{group_of(run)}, {methods_of(run)}" if several else methods_of(run)
        series.setdefault(text, []).append(run)
    found = fronts(runs, measure)
    best = {run.number for members in found.values() for run in members}

    def points_of(members: Sequence[ReportRun]) -> list[tuple[float, float, int]]:
        return [(*coordinates(run, axis, measure), run.number) for run in members]

    def make(figure: Any, axes: Any) -> None:
        plot = axes[0, 0]
        scale_axis(plot.xaxis, axis.scale)
        scale_axis(plot.yaxis, scale)
        for index, (text, members) in enumerate(series.items()):
            points = sorted(points_of(members))
            style = series_style(index)
            if methods_of(members[0]) in REFERENCES and len(members) > 1:
                plot.plot([x for x, _, _ in points], [y for _, y, _ in points], color=style["color"],
                          linestyle=style["linestyle"], linewidth=1, zorder=1)  # fmt: skip
            _points(plot, points, best, style, f"{text} ({len(members)})")
        for members in found.values():
            _draw_front(plot, points_of(members))
        if max(x for x, _, _ in points_of(runs)) > axis.whole:
            plot.axvline(
                axis.whole, color="#666666", linestyle=(0, (1, 2)), linewidth=1, label="no compression"
            )
        plot.set_xlabel(axis.label)
        plot.set_ylabel(label)
        legend_below(figure, plot)

    lines = " Joined points of svd and shared_basis are references." if _has_references(runs) else ""
    return picture(
        name,
        title,
        f"{label} of every run against {axis.label}; lower left is better. The line joins the Pareto front, whose "
        f"runs are filled and carry their numbers; a run that keeps more than there was is on none.{lines}",
        make,
        height=4.0,
    )


def _has_references(runs: Sequence[ReportRun]) -> bool:
    return any(methods_of(run) in REFERENCES for run in runs)


def perplexity_front(runs: Sequence[ReportRun]) -> Picture:
    """Return what the patched model loses against the kept share of the whole model; one series per text.

    That is the rise over the original with its paired interval where every run was measured beside it, or else
    perplexity.
    """
    axis = size_axis(runs)
    series: dict[str, list[ReportRun]] = {}
    for run in runs:
        assert run.quality is not None
        series.setdefault(run.quality.text, []).append(run)
    paired = all(run.quality is not None and run.quality.rise is not None for run in runs)

    def make(figure: Any, axes: Any) -> None:
        plot = axes[0, 0]
        for index, (text, members) in enumerate(series.items()):
            points = [(run.number, *_perplexity_point(run, axis, paired=paired)) for run in members]
            smaller = [point for point in points if point[1] <= axis.whole]
            best = [smaller[at] for at in pareto([(x, y) for _, x, y, _, _ in smaller])]
            for _, x, _, low, high in points:
                if low is not None and high is not None:
                    plot.plot([x, x], [low, high], color=GREY, linewidth=1)
            style = series_style(index) | {"linestyle": "none"}
            chosen = {number for number, *_ in best}
            _points(plot, [(x, y, number) for number, x, y, _, _ in points], chosen, style, text)
            _draw_front(plot, [(x, y, number) for number, x, y, _, _ in best])
            originals = {run.quality.original for run in members if run.quality is not None} - {None}
            for before in {0.0} if paired else originals:
                plot.axhline(
                    before, color="#444444", linestyle=(0, (2, 3)), linewidth=1, label="the original"
                )
        scale_axis(plot.xaxis, axis.scale)
        plot.set_xlabel("kept parameters of the whole model (%)" if axis is KEPT else axis.label)
        plot.set_ylabel("rise of perplexity over the original (%)" if paired else "perplexity per token")
        legend_below(figure, plot)

    what = "Rise of the perplexity of the patched model over the original's" if paired else "Perplexity"
    return picture(
        "fig-perplexity",
        "Perplexity against size",
        f"{what} against size; lower left is better. Grey bars are bootstrap intervals"
        f"{', paired by windows of the text' if paired else ''}. The line joins the Pareto front.",
        make,
        height=4.0,
    )


def _perplexity_point(
    run: ReportRun, axis: SizeAxis, *, paired: bool
) -> tuple[float, float, float | None, float | None]:
    """Return the size, of the whole model unless in bits, the figure, and the ends of its interval."""
    quality, summary = run.quality, run.summary
    assert quality is not None
    assert summary is not None
    kept = 100 * (quality.kept_model if quality.kept_model is not None else summary.kept_model())
    size = kept if axis is KEPT else axis.size(summary)
    if not paired or quality.rise is None:
        return size, quality.perplexity, quality.low, quality.high
    rise, low, high = (None if value is None else 100 * value for value in quality.rise)
    assert rise is not None
    return size, rise, low, high


def _points(
    plot: Any, points: Sequence[tuple[float, float, int]], best: set[int], style: dict[str, Any], name: str
) -> None:
    """Draw the points filled where the run is on a front, hollow where it is not."""
    style = style | {"linestyle": "none"}
    hollow = style | {"markerfacecolor": "none", "markeredgecolor": style["color"], "markeredgewidth": 1.0}
    for kind, inside in ((hollow, False), (style, True)):
        chosen = [(x, y) for x, y, number in points if (number in best) is inside]
        own = name if inside or not any(number in best for *_, number in points) else None
        if chosen:
            plot.plot(*zip(*chosen, strict=True), label=own, **kind)


def _draw_front(plot: Any, points: Sequence[tuple[float, float, int]]) -> None:
    """Draw steps between the points of a front, and the number of each run beside it."""
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    plot.plot(xs, ys, drawstyle="steps-post", color="#444444", linewidth=1, zorder=1)
    plot.margins(x=0.06, y=0.1)  # room for the numbers
    plot.autoscale_view()
    scale = 72 / plot.figure.dpi
    places = [tuple(scale * one for one in plot.transData.transform((x, y))) for x, y, _ in points]
    for (x, y, number), drop in zip(points, label_drops(places), strict=True):
        plot.annotate(
            f"#{number}", (x, y), textcoords="offset points", xytext=(-4, drop), fontsize=8, ha="right"
        )


def label_drops(places: Sequence[tuple[float, float]]) -> list[float]:
    """Return how far below its point each label goes, in points of type, so that none covers one before it."""
    taken: list[tuple[float, float]] = []
    drops = []
    for x, y in places:
        drop = -_LINE
        while any(abs(x - left) < _LABEL and abs(y + drop - low) < _LINE for left, low in taken):
            drop -= 1
        taken.append((x, y + drop))
        drops.append(drop)
    return drops


Grid = dict[tuple[int, int], float]
"""Figure of the runs of every (m, r), mean over the runs that share both."""


def size_grids(runs: Sequence[ReportRun], value: Callable[[ReportRun], float | None]) -> dict[str, Grid]:
    """Return a figure over m and r, one grid for each support and whatever else runs differ in but seeds.

    Only runs whose banks have one size each count, and only grids of several m and several r are returned.
    """
    sized = [run for run in runs if methods_of(run) not in REFERENCES]
    others = [name for name in varied_options(sized) if name not in (*_SIZES, SEED)]
    short = short_names(others)
    found: dict[str, dict[tuple[int, int], list[float]]] = {}
    for run in sized:
        banks = () if run.summary is None else run.summary.banks
        sizes = {(bank.m, bank.r, bank.atom_rank) for bank in banks}
        if len(sizes) != 1 or (figure := value(run)) is None:
            continue
        ((m, r, rank),) = sizes
        words = [*settings(run, others, short), *([f"k={rank}"] if rank is not None else [])]
        title = ", ".join(words) or "all runs"
        found.setdefault(title, {}).setdefault((m, r), []).append(figure)
    grids = {name: {size: mean(values) for size, values in grid.items()} for name, grid in found.items()}
    return {
        name: grid
        for name, grid in grids.items()
        if min(len(set(one)) for one in zip(*grid, strict=True)) > 1
    }


def size_maps(grids: dict[str, Grid], name: str, what: str, form: str = "{:.4f}") -> Picture:
    """Return the grids as heat maps side by side, with one scale of colours; the least figure of each is framed."""
    shown = dict(list(grids.items())[:_MOST_MAPS])
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    low = min(min(grid.values()) for grid in shown.values())
    high = max(max(grid.values()) for grid in shown.values())

    def make(figure: Any, axes: Any) -> None:
        image = None
        for at, plot in enumerate(axes.flat):
            if at >= len(shown):
                plot.axis("off")
                continue
            title, grid = list(shown.items())[at]
            image = _heat_map(plot, grid, (low, high), form)
            plot.set_title(title)
            plot.set_xlabel("r, rows of an atom")
            if at % columns == 0:
                plot.set_ylabel("m, atoms")
        figure.colorbar(image, ax=axes, label=what, shrink=0.9)

    left = len(grids) - len(shown)
    return picture(
        name,
        f"{what} over sizes",
        f"{what} for every number of atoms m and rows r, a map for each support; the least of a map is framed. Runs of "
        f"several seeds count by their mean.{f' {left} further maps are left out.' if left else ''}",
        make,
        rows=rows,
        columns=columns,
        height=2.9,
    )


def _heat_map(plot: Any, grid: Grid, limits: tuple[float, float], form: str) -> Any:
    ms, rs = (sorted(set(one)) for one in zip(*grid, strict=True))
    values = [[grid.get((m, r), float("nan")) for r in rs] for m in ms]
    image = plot.imshow(values, aspect="auto", cmap="cividis", vmin=limits[0], vmax=limits[1], origin="lower")
    plot.grid(False)
    plot.set_xticks(range(len(rs)), [str(r) for r in rs])
    plot.set_yticks(range(len(ms)), [str(m) for m in ms])
    best = min(grid, key=lambda size: (grid[size], size))
    middle = sum(limits) / 2
    for (m, r), value in grid.items():
        place = rs.index(r), ms.index(m)
        colour = ON_LIGHT if value > middle else ON_DARK
        weight = "bold" if (m, r) == best else "normal"
        plot.text(
            *place, form.format(value), ha="center", va="center", color=colour, fontsize=8, weight=weight
        )
    x, y = rs.index(best[1]), ms.index(best[0])
    frame = (
        [x - 0.48, x + 0.48, x + 0.48, x - 0.48, x - 0.48],
        [y - 0.48, y - 0.48, y + 0.48, y + 0.48, y - 0.48],
    )
    plot.plot(*frame, color=ON_DARK, linewidth=2)
    return image


def support_series(runs: Sequence[ReportRun]) -> dict[str, list[tuple[float, float, int]]]:
    """Return (median support, RelFrob, number) of runs that differ in their support alone, by what they share."""
    fitted = [run for run in runs if run.measured and methods_of(run) not in REFERENCES]
    others = [name for name in varied_options(fitted) if name != SUPPORT]
    short = short_names(others)
    series: dict[str, list[tuple[float, float, int]]] = {}
    for run in fitted:
        if run.support_median is None or run.summary is None:
            continue
        same = " ".join(settings(run, others, short))
        point = (run.support_median, run.summary.relfrob, run.number)
        series.setdefault(same or group_of(run), []).append(point)
    return {name: sorted(points) for name, points in series.items()}


def error_by_support(series: dict[str, list[tuple[float, float, int]]]) -> Picture:
    """Return RelFrob against the median support; runs that differ in their support alone are joined."""
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
        plot.set_ylabel(_RELFROB)
        legend_below(figure, plot)

    left = len(series) - len(named)
    rest = f" {left} further series are grey." if left else ""
    return picture(
        "fig-support",
        "Error against support",
        f"What sparse codes cost: lines join runs that differ in their support alone.{rest}",
        make,
        height=4.0,
    )


def _xy(points: Sequence[tuple[float, float, int]]) -> tuple[list[float], list[float]]:
    return [x for x, _, _ in points], [y for _, y, _ in points]
