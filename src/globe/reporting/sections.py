"""What a report says, in order, whatever document it ends up in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from globe.reporting import bank_plots, sweep_plots
from globe.reporting.front import CURVES, Track, all_tracks, fronts, highlighted, tracks
from globe.reporting.labels import common_options, labels, varied_options
from globe.reporting.runs import ReportRun
from globe.reporting.style import Picture
from globe.reporting.tables import Table, bank_table, run_table, trouble_table


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    paragraphs: tuple[str, ...] = ()
    table: Table | None = None
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    title: str
    introduction: tuple[str, ...]
    sections: tuple[Section, ...]
    common: dict[str, Any]
    """options that are alike in all runs"""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(picture for section in self.sections for picture in section.pictures)


def build(runs: Sequence[ReportRun], title: str, *, details: int) -> Report:
    """All sections. A picture for which the runs hold no data is replaced by a sentence that says so."""
    varied, names = varied_options(runs), labels(runs)
    measured = [run for run in runs if run.measured]
    sections = [_unfinished(runs)]
    if measured:
        curves = tracks([run for run in measured if run.traces], names, CURVES)  # closed forms have none
        everything = all_tracks(measured, names, alone=len(measured) == 1)
        detailed = tracks(measured, names, details)
        sections += [
            _runs(runs, varied),
            _size(measured),
            _perplexity(measured),
            _support(measured, varied),
            _convergence(measured, curves),
            _schedules(sweep_plots.distinct_schedules(everything, CURVES)),
            _codes(detailed),
            _spectra(detailed),
            _layers(measured, names),
            _jaccard(measured, names),
        ]
    return Report(
        title,
        _introduction(runs, varied),
        tuple(one for one in sections if one is not None),
        common_options(runs),
    )


def _introduction(runs: Sequence[ReportRun], varied: Sequence[str]) -> tuple[str, ...]:
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    total = f"{len(runs)} run{'s' * (len(runs) != 1)}: {counts}."
    sources = {run.summary.source.get("id"): run.summary for run in runs if run.summary is not None}
    models = [
        f"{name} ({summary.source.get('model_type')}, {summary.total_parameters:,} parameters)"
        for name, summary in sources.items()
    ]
    times = sorted(one for run in runs for one in (run.started, run.ended) if one)
    first = f"{total} Model: {', '.join(models)}." if models else total
    when = f"From {times[0]} to {times[-1]}." if times else ""
    differ = f"The runs differ in {', '.join(varied)}." if varied else ""
    if len(runs) > 1 and not varied:
        differ = "The runs differ in no option of their config.yaml."
    return tuple(text for text in (first, " ".join(one for one in (differ, when) if one)) if text)


def _unfinished(runs: Sequence[ReportRun]) -> Section | None:
    table = trouble_table(runs)
    if not table.rows:
        return None
    return Section(
        "Not finished",
        ("The same command of globe.train tries what failed once more and goes on with what was cut off.",),
        table,
    )


def _runs(runs: Sequence[ReportRun], varied: Sequence[str]) -> Section:
    table = run_table(runs, varied)
    text = (
        "RelFrob is the relative Frobenius error of what was saved, kept the share of parameters that is left: of the "
        "compressed families, and of the whole model. Runs on the Pareto front are bold."
    )
    banks = bank_table(runs)
    if banks.rows and len(runs) == 1:
        return Section("Banks", (text.rpartition(" Runs")[0],), banks)
    return Section("Runs", (text,), table)


def _size(measured: Sequence[ReportRun]) -> Section:
    if len(measured) < 2:
        assert measured[0].summary is not None
        one = measured[0].summary
        return Section(
            "Error and size",
            (
                f"RelFrob {one.relfrob:.4f} with {one.kept:.1%} of the compressed families and "
                f"{one.kept_model():.1%} of the whole model kept; a front needs several runs.",
            ),
        )
    found = fronts(measured)
    said = tuple(
        f"Pareto front of {name}: {', '.join(f'#{run.number}' for run in members)}."
        for name, members in found.items()
    )
    return Section("Error against size", said, None, (sweep_plots.error_front(measured),))


def _perplexity(measured: Sequence[ReportRun]) -> Section:
    judged = [run for run in measured if run.quality is not None]
    title = "Perplexity against size"
    if not judged:
        return Section(title, ("Not evaluated yet: python -m globe.evaluate model=RUN measures a run.",))
    said = []
    if len({run.quality.text for run in judged if run.quality is not None}) > 1:
        said.append(
            "The runs were evaluated on different texts or windows, whose perplexities do not compare."
        )
    if len(judged) < len(measured):
        said.append(f"{len(judged)} of {len(measured)} runs have been evaluated.")
    rises = [run.quality.rise for run in judged if run.quality is not None and run.quality.rise is not None]
    bounds = [(low, high) for _, low, high in rises if low is not None and high is not None]
    if bounds and all(low <= 0 <= high for low, high in bounds):
        said.append(
            "Every interval holds the original's perplexity: this text does not tell these runs apart."
        )
    if len(judged) == 1:
        quality = judged[0].quality
        assert quality is not None
        before = "" if quality.original is None else f", {quality.original:.4f} before"
        return Section(title, (*said, f"Perplexity {quality.perplexity:.4f}{before}, on {quality.text}."))
    return Section(title, tuple(said), None, (sweep_plots.perplexity_front(judged),))


def _support(measured: Sequence[ReportRun], varied: Sequence[str]) -> Section | None:
    if len(measured) < 2:
        return None
    series = sweep_plots.support_series(measured, varied)
    title = "Error against support"
    if len({x for points in series.values() for x, _, _ in points}) < 2:
        return Section(
            title,
            ("All runs end with the same median support: sweep codes.target_support for this picture.",),
        )
    return Section(title, (), None, (sweep_plots.error_by_support(series),))


def _convergence(measured: Sequence[ReportRun], curves: Sequence[Track]) -> Section:
    if not any(run.traces for run in measured):
        return Section("Convergence", ("No run has a step in its metrics.jsonl: closed forms take none.",))
    with_steps = [one for one in curves if one.bank.key in one.run.traces]
    return Section("Convergence", (), None, (sweep_plots.convergence(measured, with_steps),))


def _schedules(curves: Sequence[Track]) -> Section | None:
    picture = sweep_plots.trajectories(curves)
    constant = sweep_plots.constant_schedules(curves)
    if picture is None and not constant:
        return None
    fixed = (f"Throughout: {', '.join(constant)}.",) if constant else ()
    return Section("Temperature, lam and beta", fixed, None, () if picture is None else (picture,))


def _codes(detailed: Sequence[Track]) -> Section:
    drawn = [one for one in detailed if one.bank.charts is not None]
    if not drawn:
        return Section("Atom usage and codes", (_no_charts(detailed),))
    pictures = tuple(bank_plots.code_map(one, index) for index, one in enumerate(drawn, start=1))
    said = (
        "Share alpha_ij / sum_j alpha_ij of every atom in every expert, darker (by the square root) for more and "
        "white for none; above, how many experts use an atom; right, the error of each expert."
    )
    return Section("Atom usage and codes", (said,), None, pictures)


def _spectra(detailed: Sequence[Track]) -> Section | None:
    drawn = [one for one in detailed if one.bank.charts is not None]
    return Section("Singular values", (), None, (bank_plots.spectra(drawn),)) if drawn else None


def _no_charts(detailed: Sequence[Track]) -> str:
    if not detailed:
        return "Left out, as details=0 asks for."
    return (
        "The summaries of these runs hold neither codes nor spectra: an earlier version wrote them, and "
        "overwrite=true repeats a run."
    )


def _layers(measured: Sequence[ReportRun], names: Mapping[int, str]) -> Section | None:
    series = bank_plots.layer_series(highlighted(measured, CURVES), names)
    if not series:
        return None
    chosen = dict(list(series.items())[:CURVES])
    left = len(series) - len(chosen)
    said = (f"{left} further series are in runs.csv.",) if left else ()
    return Section("Layers", said, None, (bank_plots.layer_profile(chosen),))


def _jaccard(measured: Sequence[ReportRun], names: Mapping[int, str]) -> Section | None:
    series = bank_plots.jaccard_series(highlighted(measured, CURVES), names)
    means = {
        names[run.number]: run.summary.metrics.get("support_jaccard")
        for run in measured
        if run.summary is not None
    }
    known = {name: value for name, value in means.items() if value is not None}
    if not known:
        return None
    title = "Supports of up and gate"
    if max((len(points) for points in series.values()), default=0) < 2:
        listed = "; ".join(f"{name}: {value:.3f}" for name, value in known.items())
        return Section(title, (f"Jaccard index of the supports, mean over experts and layers: {listed}.",))
    return Section(title, (), None, (bank_plots.jaccard_profile(series),))
