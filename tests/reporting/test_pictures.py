"""What the pictures show: the numbers of the runs, on axes that say what and in which unit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from globe.reporting import bank_plots, curve_plots, sweep_plots
from globe.reporting.front import BITS, KEPT, Track, fronts, size_axis, tracks
from globe.reporting.labels import labels
from globe.reporting.plot import Picture, few_markers, series_style
from globe.reporting.run_files import Quality
from globe.reporting.runs import ReportRun
from globe.reporting.tables import run_table
from globe.runs.chart_data import BankCharts


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The axes of the figures that are made, which are not rendered."""
    from matplotlib.figure import Figure

    kept: list[Any] = []

    def picture(
        name: str,
        title: str,
        caption: str,
        make: Any,
        *,
        rows: int = 1,
        columns: int = 1,
        height: float = 3,
        greys: bool = False,
        **shared: Any,
    ) -> Picture:
        axes = Figure(figsize=(7, height * rows)).subplots(rows, columns, squeeze=False, **shared)
        make(axes[0, 0].figure, axes)
        kept.append(axes)
        return Picture(name, title, caption, b"", b"")

    for module in (sweep_plots, bank_plots, curve_plots):
        monkeypatch.setattr(module, "picture", picture)
    yield kept
    for axes in kept:
        assert all(plot.get_xlabel() for plot in axes[-1] if plot.has_data())


def lines_of(plot: Any) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for line in plot.lines:
        xs, ys = (np.asarray(values, dtype=float).tolist() for values in line.get_data())
        found[str(line.get_label())] = (xs, ys)
    return found


@pytest.fixture
def measured(runs: tuple[ReportRun, ...]) -> tuple[ReportRun, ...]:
    return runs[:3]


@pytest.fixture
def all_tracks(measured: tuple[ReportRun, ...]) -> list[Track]:
    return tracks(measured, labels(measured), 8)


def test_the_front_shows_percent_and_joins_what_is_best(
    drawn: list[Any], measured: tuple[ReportRun, ...]
) -> None:
    # the third has the size of the second and the same error, so only the first of these two is on the front
    figures = [(0.4, 0.5), (0.6, 0.3), (0.6, 0.3)]
    measured = tuple(
        _with_kept(run, at, *figure)
        for at, (run, figure) in enumerate(zip(measured, figures, strict=False), start=1)
    )
    sweep_plots.error_front(measured)
    plot = drawn[0][0, 0]
    points = sorted((100 * run.summary.kept, run.summary.relfrob) for run in measured if run.summary)
    shown = sorted(
        point
        for line in plot.lines
        if line.get_marker() == "o"
        for point in zip(*line.get_data(), strict=True)
    )
    assert np.allclose(shown, points)
    (front,) = [line for line in plot.lines if line.get_drawstyle() == "steps-post"]
    errors = list(front.get_ydata())
    assert errors == sorted(errors, reverse=True)
    assert min(errors) == min(y for _, y in points)
    assert [text.get_text() for text in plot.texts] == ["#1", "#2"]
    assert "(%)" in plot.get_xlabel()


def test_perplexity_has_its_interval_and_the_original(
    drawn: list[Any], measured: tuple[ReportRun, ...]
) -> None:
    sweep_plots.perplexity_front(measured)
    plot = drawn[0][0, 0]
    found = [tuple(map(list, line.get_data())) for line in plot.lines]
    assert any(xs == [90.0, 90.0] and np.allclose(ys, [0, 50]) for xs, ys in found)
    shown = {round(float(y), 6) for line in plot.lines if line.get_marker() == "o" for y in line.get_ydata()}
    assert shown == {round(100 * (perplexity / 6.5 - 1), 6) for perplexity in (8.0, 7.0)}
    assert "rise" in plot.get_ylabel()
    alone = [replace(run, quality=replace(run.quality, rise=None)) for run in measured if run.quality]
    sweep_plots.perplexity_front(alone)
    plot = drawn[1][0, 0]
    assert ([90.0, 90.0], [7.5, 8.5]) in [tuple(map(list, line.get_data())) for line in plot.lines]
    assert list(lines_of(plot)["the original"][1]) == [6.5, 6.5]


def test_runs_that_differ_in_support_alone_are_joined(
    drawn: list[Any], measured: tuple[ReportRun, ...]
) -> None:
    sparse = replace(measured[1], summary=_with_supports(measured[1], 2))
    series = sweep_plots.support_series((measured[0], sparse, measured[2]))
    assert {name: [x for x, _, _ in points] for name, points in series.items()} == {"m=2": [2], "m=3": [2, 3]}
    sweep_plots.error_by_support(series)
    assert lines_of(drawn[0][0, 0])["m=3"][0] == [2, 3]


def _with_supports(run: ReportRun, size: int) -> Any:
    assert run.summary is not None
    banks = tuple(replace(bank, supports=(size,) * bank.n) for bank in run.summary.banks)
    return replace(run.summary, banks=banks)


def test_curves_start_at_the_warm_start_and_the_others_are_grey(
    drawn: list[Any], measured: tuple[ReportRun, ...], all_tracks: list[Track]
) -> None:
    picture = curve_plots.convergence(measured, all_tracks[:1])
    found = lines_of(drawn[0][0, 0])
    xs, ys = found[all_tracks[0].label]
    assert np.allclose(xs, [0, 0.1, 0.2, 0.3, 0.4])
    assert np.allclose(ys, [0.9, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    by_step = lines_of(drawn[0][0, 1])[all_tracks[0].label]
    assert by_step[0] == [0, 1, 2, 3, 4]
    assert np.allclose(by_step[1], ys)
    assert [plot.get_xlabel() for plot in drawn[0][0]] == ["wall-clock time of the fit (s)", "step"]
    assert all(sum(line.get_color() == sweep_plots.GREY for line in plot.lines) == 2 for plot in drawn[0][0])
    assert "The 2 others are grey" in picture.caption


def test_only_schedules_that_move_are_drawn(drawn: list[Any], all_tracks: list[Track]) -> None:
    assert curve_plots.trajectories(all_tracks) is None
    assert curve_plots.constant_schedules(all_tracks) == ["temperature = 1", "lam = 0", "beta = 1"]
    assert len(curve_plots.distinct_schedules(all_tracks, 8)) == 1
    one = all_tracks[0]
    trace = replace(one.run.traces[one.bank.key], lam=(0.0, 0.5, None, 1.0))
    moved = Track(replace(one.run, traces={one.bank.key: trace}), one.bank, one.label)
    both = curve_plots.distinct_schedules([*all_tracks, moved], 8)
    assert len(both) == 2
    assert curve_plots.trajectories(both) is not None
    (axes,) = drawn
    assert axes.shape == (1, 1)
    assert axes[0, 0].get_ylabel() == "homotopy lam"
    ys = lines_of(axes[0, 0])[moved.label][1]
    assert ys[:2] == [0, 0.5]
    assert np.isnan(ys[2])


def test_codes_usage_and_errors_stand_in_line(drawn: list[Any], all_tracks: list[Track]) -> None:
    one = all_tracks[0]
    charts = BankCharts((0, 3), (1,), ((0.25,), (0.75,)), (0,), (1, 5), (2.0, 1.0), (1.9, 1e-9))
    bank = replace(one.bank, charts=charts, atom_usage=(0, 5), m=2)
    picture = bank_plots.code_map(Track(one.run, bank, one.label), 1)
    (above, _), (middle, beside) = drawn[0]
    assert middle.images[0].get_array().tolist() == [[0.25], [0.75]]
    assert [bar.get_height() for bar in above.patches] == [5]
    assert [bar.get_width() for bar in beside.patches] == [bank.expert_relfrob[0], bank.expert_relfrob[3]]
    assert "2 of 6 experts, evenly spaced; the 1 most used of 2 atoms" in picture.caption
    assert "1 of the atoms unused" in picture.caption
    bank_plots.spectra([Track(one.run, bank, one.label)])
    found = lines_of(drawn[1][0, 0])
    assert found["original"] == ([1, 5], [2, 1])
    assert np.isnan(found["rebuilt"][1][1])  # rounding is not drawn
    assert drawn[1][0, 0].get_yscale() == "log"


def test_layers_come_from_banks_or_from_the_members_of_one(measured: tuple[ReportRun, ...]) -> None:
    run = measured[0]
    assert run.summary is not None
    (bank,) = run.summary.banks
    alone = [
        replace(bank, key=f"layer{at:03d}.up", relfrob=at / 10, metrics={"effective_rank_mean": 4.0 + at})
        for at in (5, 3)
    ]
    series = bank_plots.layer_series(
        [replace(run, summary=replace(run.summary, banks=tuple(alone)))], {1: "#1"}
    )
    assert series == {"up": {3: (0.3, 7.0), 5: (0.5, 9.0)}}
    shared = replace(
        bank, key="layers003-005.gate", metrics={f"relfrob_layer{at:03d}_gate": 0.25 for at in (3, 5)}
    )
    series = bank_plots.layer_series([replace(run, summary=replace(run.summary, banks=(shared,)))], {1: "#1"})
    assert series == {"gate": {3: (0.25, None), 5: (0.25, None)}}
    assert bank_plots.layer_series(measured, labels(measured)) == {}


def test_series_stay_apart_without_colour() -> None:
    styles = [series_style(index) for index in range(8)]
    assert len({style["marker"] for style in styles}) == 8
    assert len({style["color"] for style in styles}) == 8
    shades = [_luminance(style["color"]) for style in styles]
    neighbours = [abs(a - b) for a, b in itertools.pairwise(shades)]
    lines = [str(style["linestyle"]) for style in styles]
    assert all(gap > 0.05 or lines[at] != lines[at + 1] for at, gap in enumerate(neighbours))
    starts = {few_markers(index, 80)[0] for index in range(4)}
    assert len(starts) == 4  # curves that lie on each other all show


def _luminance(colour: str) -> float:
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_the_numbers_beside_a_front_cover_no_other() -> None:
    places = [(100.0, 90.0), (109.0, 85.0), (115.0, 84.0), (300.0, 40.0)]
    drops = sweep_plots.label_drops(places)
    assert (drops[0], drops[3]) == (-11, -11)
    for (x, y), (left, low) in itertools.combinations(
        [(x, y + drop) for (x, y), drop in zip(places, drops, strict=True)], 2
    ):
        assert abs(x - left) >= 24 or abs(y - low) >= 11


def _with_kept(
    run: ReportRun, number: int, kept: float, relfrob: float, bits: float = 16, **changes: Any
) -> ReportRun:
    """The run with a bank that keeps a share of the numbers, each of so many bits."""
    assert run.summary is not None
    (bank,) = run.summary.banks
    numbers = round(kept * bank.parameters)
    metrics = bank.metrics | {"bytes": bits / 8 * numbers}
    bank = replace(bank, kept_parameters=numbers, relfrob=relfrob, metrics=metrics, **changes)
    return replace(run, number=number, summary=replace(run.summary, banks=(bank,)))


def test_a_run_that_keeps_more_than_there_was_is_on_no_front(
    drawn: list[Any], measured: tuple[ReportRun, ...]
) -> None:
    runs = [_with_kept(measured[0], at, *point) for at, point in enumerate([(0.4, 0.5), (1.2, 0.1)], start=1)]
    sweep_plots.error_front(runs)
    plot = drawn[0][0, 0]
    assert [text.get_text() for text in plot.texts] == ["#1"]
    hollow = [line for line in plot.lines if line.get_markerfacecolor() == "none"]
    assert [list(line.get_ydata()) for line in hollow] == [[0.1]]
    assert any(list(line.get_xdata()) == [100, 100] for line in plot.lines)


def test_runs_with_rounded_factors_are_compared_by_bits(
    drawn: list[Any], measured: tuple[ReportRun, ...]
) -> None:
    dense = [_with_kept(measured[0], 1, 0.4, 0.3)]
    assert size_axis(dense) is KEPT
    runs = [
        *dense,
        _with_kept(measured[0], 2, 0.5, 0.31, bits=4),
        _with_kept(measured[0], 3, 0.9, 0.35, bits=4),
    ]
    assert size_axis(runs) is BITS
    (front,) = fronts(runs).values()
    assert [run.number for run in front] == [2, 1]
    sweep_plots.error_front(runs)
    plot = drawn[0][0, 0]
    assert plot.get_xscale() == "log"
    assert sorted(text.get_text() for text in plot.texts) == ["#1", "#2"]
    places = sorted(float(x) for line in plot.lines if line.get_marker() == "o" for x in line.get_xdata())
    assert places == pytest.approx([2, 3.6, 6.4], rel=1e-3)
    table = run_table(runs, ())
    assert "bits a weight" in [column.heading for column in table.columns]
    assert "bits a weight" not in [column.heading for column in run_table(dense, ()).columns]


def test_divergence_has_a_front_of_its_own(drawn: list[Any], measured: tuple[ReportRun, ...]) -> None:
    quality = Quality(
        perplexity=9.0, low=None, high=None, original=8.0, rise=None, kl=0.0, kept_model=None, text="a text"
    )
    figures = [(0.4, 0.01), (0.6, 0.02), (0.8, 0.005)]
    runs = [
        replace(_with_kept(measured[0], at, kept, 0.3), quality=replace(quality, kl=kl))
        for at, (kept, kl) in enumerate(figures, start=1)
    ]
    sweep_plots.kl_front(runs)
    plot = drawn[0][0, 0]
    assert plot.get_yscale() == "log"
    assert sorted(text.get_text() for text in plot.texts) == ["#1", "#3"]


def test_baselines_of_closed_form_are_lines_of_reference(
    drawn: list[Any], measured: tuple[ReportRun, ...]
) -> None:
    runs = [_with_kept(measured[0], 1, 0.4, 0.3)]
    runs += [_with_kept(measured[0], 2 + at, 0.6 - at / 5, 0.4 + at / 9, method="svd") for at in range(2)]
    picture = sweep_plots.error_front(runs)
    joined = [
        line for line in drawn[0][0, 0].lines if len(line.get_xdata()) == 2 and line.get_marker() == "None"
    ]
    assert [round(float(x)) for x in joined[0].get_xdata()] == [40, 60]
    assert joined[0].get_linestyle() != "None"
    assert "references" in picture.caption


def test_maps_over_sizes_hold_the_mean_over_seeds(drawn: list[Any], measured: tuple[ReportRun, ...]) -> None:
    cells = [(2, 11), (2, 5), (3, 11), (3, 5), (3, 5)]
    errors = [0.5, 0.7, 0.2, 0.4, 0.6]
    runs = [
        _with_kept(replace(measured[0], options={"seed": at}), at, 0.5, error, m=m, r=r)
        for at, ((m, r), error) in enumerate(zip(cells, errors, strict=True))
    ]
    grids = sweep_plots.size_grids(runs, lambda run: run.relfrob)
    assert grids == {"all runs": {(2, 11): 0.5, (2, 5): 0.7, (3, 11): 0.2, (3, 5): pytest.approx(0.5)}}
    sweep_plots.size_maps(grids, "fig-sizes", "RelFrob")
    plot = drawn[0][0, 0]
    assert np.allclose(plot.images[0].get_array(), [[0.7, 0.5], [0.5, 0.2]])
    assert [label.get_text() for label in plot.get_yticklabels()] == ["2", "3"]
    assert [label.get_text() for label in plot.get_xticklabels()] == ["5", "11"]
    assert [text.get_text() for text in plot.texts if text.get_weight() == "bold"] == ["0.2000"]
    sparse = [
        replace(run, options=run.options | {"codes.target_support": at % 2}) for at, run in enumerate(runs)
    ]
    found = sweep_plots.size_grids(sparse, lambda run: 1.0)
    assert list(found) == ["support=0"]  # the other support has one m
    assert sweep_plots.size_grids(runs[:2], lambda run: 1.0) == {}


def test_pictures_are_sharp_and_nothing_is_cut_off() -> None:
    from xml.etree import ElementTree

    from globe.reporting.plot import WIDTH, legend_below, picture

    names = ["a name that is long enough to fill half a line", "$_{", "x" * 300]

    def make(figure: Any, axes: Any) -> None:
        for at, name in enumerate(names):
            axes[0, 0].plot([0, 1], [at, at], label=name, **series_style(at))
        axes[0, 0].annotate("far " * 40, (0, 0))
        legend_below(figure, axes[0, 0])
        legend = figure.legends[0]
        shown = "".join(text.get_text().replace("\n", "") for text in legend.get_texts())
        assert shown == "".join(names)

    made = picture("fig-x", "X", "x", make)
    assert made.png.startswith(b"\x89PNG")
    assert made.width > 110 * WIDTH  # wider than its figure: what stands outside is there
    root = ElementTree.fromstring(made.svg)
    assert root.tag.endswith("svg")
    assert picture("fig-x", "X", "x", make) == made
