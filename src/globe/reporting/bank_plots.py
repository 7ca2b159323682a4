"""Pictures of single banks and of layers: code shares, spectra, the profile through the model, up beside gate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from globe.reporting.front import Track
from globe.reporting.plot import Picture, legend_below, picture, series_style
from globe.reporting.runs import ReportRun
from globe.runs.chart_data import BankCharts
from globe.runs.summary import BankReport

_MEMBER = re.compile(r"relfrob_layer(\d+)_(\w+)")
_ONE_LAYER = re.compile(r"layer(\d+)\.(\w+)")
_JACCARD = re.compile(r"support_jaccard_layer(\d+)")


def code_map(track: Track, index: int) -> Picture:
    """Return the shares of the atoms in every expert, with the use of each atom above and expert errors beside."""
    bank, charts = track.bank, track.bank.charts
    assert charts is not None
    height = min(7.0, max(3.4, 1.6 + 0.11 * len(charts.code_experts)))

    def make(figure: Any, axes: Any) -> None:
        (above, corner), (middle, beside) = axes
        corner.axis("off")
        _heat_map(figure, middle, charts)
        usage = [bank.atom_usage[atom] for atom in charts.code_atoms]
        above.bar(range(len(usage)), usage, color="#777777", width=0.8)
        above.set_ylabel(f"experts\n(of {bank.n})")
        above.set_ylim(0, bank.n)
        above.tick_params(labelbottom=False)
        errors = [bank.expert_relfrob[expert] for expert in charts.code_experts]
        beside.barh(range(len(errors)), errors, color="#777777", height=0.8)
        beside.set_xlabel("RelFrob")
        beside.tick_params(labelleft=False)
        for plot in (above, beside):
            plot.grid(False, axis="x" if plot is above else "y")

    drawn = _drawn(bank, charts)
    unused = sum(count == 0 for count in bank.atom_usage)
    return picture(
        f"fig-codes-{index}",
        f"Codes of {track.label}",
        f"{track.label}: {bank.n} experts, {bank.m} atoms{drawn}; "
        f"{f'{unused} of the atoms unused' if unused else 'every atom is used'}.",
        make,
        rows=2,
        columns=2,
        height=height / 2,
        greys=True,
        sharex="col",
        sharey="row",
        gridspec_kw={"height_ratios": [1, 4], "width_ratios": [5, 1]},
    )


def _heat_map(figure: Any, plot: Any, charts: BankCharts) -> None:
    from matplotlib.colors import PowerNorm

    # by its square root, so that a small share is not taken for none
    norm = PowerNorm(0.5, vmin=0, vmax=max(max(row) for row in charts.code_shares) or 1)
    image = plot.imshow(charts.code_shares, aspect="auto", cmap="Greys", norm=norm, interpolation="nearest")
    plot.grid(False)
    plot.set_xlabel("atom")
    plot.set_ylabel("expert (row of the bank)")
    for axis, names in ((plot.xaxis, charts.code_atoms), (plot.yaxis, charts.code_experts)):
        every = max(1, len(names) // 16)
        places = list(range(0, len(names), every))
        axis.set_ticks(places, [str(names[at]) for at in places])
    figure.colorbar(
        image, ax=plot, location="left", fraction=0.05, pad=0.02, label="share of an expert's codes"
    )


def _drawn(bank: BankReport, charts: BankCharts) -> str:
    parts = []
    if len(charts.code_experts) < bank.n:
        parts.append(f"{len(charts.code_experts)} of {bank.n} experts, evenly spaced")
    if len(charts.code_atoms) < bank.m:
        parts.append(f"the {len(charts.code_atoms)} most used of {bank.m} atoms")
    return f" ({'; '.join(parts)})" if parts else ""


def spectra(chosen: Sequence[Track]) -> Picture:
    """Return singular values of the experts before and after, a panel per bank."""
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)

    def make(figure: Any, axes: Any) -> None:
        for at, plot in enumerate(axes.flat):
            if at >= len(chosen):
                plot.axis("off")
                continue
            bank, charts = chosen[at].bank, chosen[at].bank.charts
            assert charts is not None
            floor = 1e-6 * max(charts.spectrum_original)
            rebuilt = [value if value > floor else float("nan") for value in charts.spectrum_rebuilt]
            original = [value if value > floor else float("nan") for value in charts.spectrum_original]
            every = max(1, len(rebuilt) // 12)
            style = series_style(0) | {"markevery": (0, every)}
            plot.plot(charts.spectrum_ranks, original, label="original", **style)
            style = series_style(2) | {"markevery": (every // 2, every), "linestyle": (0, (4, 2))}
            plot.plot(charts.spectrum_ranks, rebuilt, label="rebuilt", **style)
            plot.axvline(
                bank.r, color="#666666", linestyle=(0, (1, 2)), linewidth=1, label="r, rows of an atom"
            )
            plot.set_yscale("log")
            plot.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
            plot.set_title(chosen[at].label)
            if at % columns == 0:
                plot.set_ylabel("singular value\n(normalised experts)")
            if at >= len(chosen) - columns:
                plot.set_xlabel("rank")
        legend_below(figure, axes[0, 0])

    counts = sorted({len(one.bank.charts.spectrum_experts) for one in chosen if one.bank.charts is not None})
    return picture(
        "fig-spectra",
        "Singular values",
        f"Of the experts before and after, in the units of the normalised experts, mean over "
        f"{' or '.join(map(str, counts))} experts. A rebuilt expert has rank r at most, beside its stored mean; "
        "values below a millionth of the largest are left out.",
        make,
        rows=rows,
        columns=columns,
        height=2.6 if rows > 1 else 3.2,
        sharex=True,
        sharey=True,
    )


def layer_series(
    runs: Sequence[ReportRun], names: Mapping[int, str]
) -> dict[str, dict[int, tuple[float, float | None]]]:
    """Return RelFrob and mean effective rank by layer, of every run and family with two layers at least."""
    series: dict[str, dict[int, tuple[float, float | None]]] = {}
    for run in runs:
        prefix = f"{names[run.number]} " if len(runs) > 1 else ""
        for bank in () if run.summary is None else run.summary.banks:
            for layer, family, error, rank in _by_layer(bank):
                series.setdefault(f"{prefix}{family}", {})[layer] = (error, rank)
    return {name: dict(sorted(points.items())) for name, points in series.items() if len(points) > 1}


def _by_layer(bank: BankReport) -> list[tuple[int, str, float, float | None]]:
    """Return layer, family, RelFrob and effective rank of every member of a bank."""
    if alone := _ONE_LAYER.fullmatch(bank.key):
        return [(int(alone[1]), alone[2], bank.relfrob, bank.metrics.get("effective_rank_mean"))]
    members = [(match, value) for name, value in bank.metrics.items() if (match := _MEMBER.fullmatch(name))]
    return [(int(match[1]), match[2], value, None) for match, value in members if value is not None]


def layer_profile(series: dict[str, dict[int, tuple[float, float | None]]]) -> Picture:
    """Return the error through the layers and, where every layer has a bank, the effective rank that explains it."""
    ranks = any(rank is not None for points in series.values() for _, rank in points.values())

    def make(figure: Any, axes: Any) -> None:
        for index, (name, points) in enumerate(series.items()):
            style = series_style(index)
            axes[0, 0].plot(list(points), [error for error, _ in points.values()], label=name, **style)
            known = {layer: rank for layer, (_, rank) in points.items() if rank is not None}
            if ranks and known:
                axes[1, 0].plot(list(known), list(known.values()), label=name, **style)
        axes[0, 0].set_ylabel("RelFrob\n(relative Frobenius error)")
        if ranks:
            axes[1, 0].set_ylabel("effective rank of experts\n(95 % of the energy)")
        axes[-1, 0].set_xlabel("layer")
        axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
        legend_below(figure, axes[0, 0])

    return picture(
        "fig-layers",
        "Layers",
        "Error of every layer, and how many singular values hold 95 % of the energy of its experts, mean over them.",
        make,
        rows=1 + ranks,
        height=2.6 if ranks else 3.4,
        sharex=True,
    )


def jaccard_series(runs: Sequence[ReportRun], names: Mapping[int, str]) -> dict[str, dict[int, float]]:
    """Return the Jaccard index of the up and gate supports by layer, of every run that has both."""
    series = {}
    for run in runs:
        found = {} if run.summary is None else run.summary.metrics
        points = {
            int(match[1]): value
            for name, value in found.items()
            if value is not None and (match := _JACCARD.fullmatch(name))
        }
        if points:
            series[names[run.number] if len(runs) > 1 else "up and gate"] = dict(sorted(points.items()))
    return series


def jaccard_profile(series: dict[str, dict[int, float]]) -> Picture:
    """Return the Jaccard indices through the layers."""

    def make(figure: Any, axes: Any) -> None:
        plot = axes[0, 0]
        for index, (name, points) in enumerate(series.items()):
            plot.plot(list(points), list(points.values()), label=name, **series_style(index))
        plot.set_ylim(-0.02, 1.05)
        plot.set_xlabel("layer")
        plot.xaxis.get_major_locator().set_params(integer=True)
        plot.set_ylabel("Jaccard index (1: same supports)")
        legend_below(figure, plot)

    return picture(
        "fig-jaccard",
        "Supports of up and gate",
        "Atoms that an expert uses in both families over those it uses in either, mean over the experts. It means "
        "something where atom j of both families is the same (bank.scope=families) or comes from the same group.",
        make,
        height=3.0,
    )
