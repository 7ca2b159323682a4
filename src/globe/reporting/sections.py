"""What a report says, in order, whatever document it ends up in."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from globe.errors import printable
from globe.reporting import bank_plots, curve_plots, sweep_plots
from globe.reporting.budget_plot import budget_picture
from globe.reporting.front import CURVES, Track, all_tracks, fronts, highlighted, tracks
from globe.reporting.labels import common_options, labels, methods_of, varied_options
from globe.reporting.plot import Picture
from globe.reporting.runs import ReportRun
from globe.reporting.tables import Table, bank_table, run_table, seed_table, trouble_table

_OF_EXPERTS = (
    *("model.path", "model.revision", "model.max_experts", "model.sample_method"),
    *("family", "layer", "normalise.metric", "calibrate.text"),
)
"""Options that say which experts a run compresses, and in what metric."""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    paragraphs: tuple[str, ...] = ()
    table: Table | None = None
    pictures: tuple[Picture, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    """names and values, of a single run"""


@dataclass(frozen=True, slots=True)
class Report:
    title: str
    introduction: tuple[str, ...]
    sections: tuple[Section, ...]
    common: dict[str, Any]
    """options that are alike in all runs"""
    single: bool
    """is it the report of one run?"""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(picture for section in self.sections for picture in section.pictures)

    @property
    def tables(self) -> tuple[Table, ...]:
        return tuple(section.table for section in self.sections if section.table is not None)


def build(runs: Sequence[ReportRun], title: str, *, details: int, folder: Path = Path()) -> Report:
    """Return all sections; a picture for which the runs hold no data is replaced by a sentence that says so.

    `details` is the number of banks that are drawn with their codes and singular values, `folder` that of the runs.
    """
    varied, names = varied_options(runs), labels(runs)
    measured = [run for run in runs if run.measured]
    sections = [_unfinished(runs)]
    if measured:
        curves = tracks([run for run in measured if run.traces], names, CURVES)  # closed forms have none
        everything = all_tracks(measured, names, alone=len(measured) == 1)
        detailed = tracks(measured, names, details)
        sections += [
            *(_one_run(measured[0]) if len(runs) == 1 else _whole_sweep(runs, measured, folder)),
            _budget(measured, names),
            _perplexity(measured, folder),
            _support(measured),
            _convergence(measured, curves),
            _schedules(curve_plots.distinct_schedules(everything, CURVES)),
            _codes(detailed),
            _spectra(detailed),
            _layers(measured, names),
            _jaccard(measured, names),
        ]
    return Report(
        printable(title),
        _introduction(runs, varied),
        tuple(one for one in sections if one is not None),
        common_options(runs),
        single=len(runs) == 1,
    )


def _introduction(runs: Sequence[ReportRun], varied: Sequence[str]) -> tuple[str, ...]:
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    total = f"{len(runs)} run{'s' * (len(runs) != 1)}: {counts}."
    if joined := sum(max(0, len(run.caches) - 1) for run in runs):
        total += (
            f" {joined} more differ from one of these in S_cache alone, share its fit, and are in its row."
        )
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
    texts = (first, " ".join(one for one in (differ, when) if one))
    return tuple(printable(text) for text in texts if text)


def _unfinished(runs: Sequence[ReportRun]) -> Section | None:
    table = trouble_table(runs)
    if not table.rows:
        return None
    said = "The same command of globe.train tries what failed once more and goes on with what was cut off."
    return Section("Not finished", (said,), table)


def _one_run(run: ReportRun) -> list[Section | None]:
    """Return what the page of a single run begins with, in place of tables and fronts of many."""
    summary, quality = run.summary, run.quality
    assert summary is not None
    facts = [
        ("RelFrob", f"{summary.relfrob:.4f}"),
        ("kept of the compressed families", f"{summary.kept:.1%}"),
        ("kept of the whole model", f"{summary.kept_model():.2%}"),
        ("banks", str(run.banks_done)),
        ("seconds", f"{summary.seconds:.1f}"),
    ]
    if quality is not None:
        facts.append(("perplexity", f"{quality.perplexity:.4f}"))
        facts += [] if quality.kl is None else [("KL, nats", f"{quality.kl:.3g}")]
    said = (
        "RelFrob is the relative Frobenius error of what was saved, kept the share of parameters that is left.",
    )
    return [Section("Error and size", said, facts=tuple(facts)), Section("Banks", (), bank_table(run))]


def _whole_sweep(
    runs: Sequence[ReportRun], measured: Sequence[ReportRun], folder: Path
) -> list[Section | None]:
    """Return what the page of a sweep begins with: its table, its front, and what sizes and seeds do."""
    text = (
        "RelFrob is the relative Frobenius error of what was saved, kept the share of parameters that is left: of the "
        "compressed families, and of the whole model."
    )
    varied = varied_options(runs)
    seeds = seed_table(runs, varied)
    return [
        Section("Runs", (text,), run_table(runs, varied)),
        _size(measured, folder),
        _maps(measured),
        None if seeds is None else Section("Seeds", (), seeds),
    ]


def _size(measured: Sequence[ReportRun], folder: Path) -> Section | None:
    if len(measured) < 2:
        return None
    said = [
        f"Pareto front of {name}: {', '.join(f'#{run.number}' for run in members)}."
        for name, members in fronts(measured).items()
    ]
    if not any(methods_of(run) in sweep_plots.REFERENCES for run in measured):
        said.append(
            "Lines of reference, a truncated SVD of every expert and one basis shared by all, come from the closed "
            f"forms of these experts, in seconds: {references_command(measured, folder)}, and this report once more."
        )
    return Section("Error against size", tuple(said), None, (sweep_plots.error_front(measured),))


def references_command(measured: Sequence[ReportRun], folder: Path) -> str:
    """Return the command that adds the closed forms for the experts of these runs to their folder."""
    common = common_options(measured)
    place = folder.resolve()
    words = {"experiment": "references", "output": str(_from_here(place.parent)), "sweep": place.name}
    words |= {name: text for name in _OF_EXPERTS if (text := _typed(common.get(name))) not in ("", "auto")}
    return " ".join(["python -m globe.train", *(shlex.quote(f"{key}={text}") for key, text in words.items())])


def _from_here(folder: Path) -> Path:
    """Return the folder as it is typed where the report is made."""
    whole = folder.resolve()
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole


def _typed(value: Any) -> str:
    """Return an option as it is typed; nothing for one that is not given."""
    if value is None:
        return ""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _budget(measured: Sequence[ReportRun], names: Mapping[int, str]) -> Section | None:
    """Return what budget.over=model gave each bank, of the first runs that have it."""
    spread = [run for run in measured if run.allocation is not None]
    if not spread:
        return None
    pictures = []
    for run in spread[:CURVES]:
        assert run.allocation is not None
        drawn = budget_picture(run.allocation, f"fig-budget-{run.number}")
        pictures.append(replace(drawn, caption=f"{names[run.number]}: {drawn.caption}"))
    left = len(spread) - len(pictures)
    said = (f"{left} further runs have a budget over all banks.",) if left else ()
    return Section("Budget over layers and families", said, None, tuple(pictures))


def _maps(measured: Sequence[ReportRun]) -> Section | None:
    """Return maps over m and r of the error, and of the perplexity where all runs have one."""
    errors = sweep_plots.size_grids(measured, lambda run: run.relfrob)
    if not errors:
        return None
    pictures = [sweep_plots.size_maps(errors, "fig-sizes", "RelFrob")]
    judged = sweep_plots.size_grids(measured, lambda run: run.perplexity)
    if judged.keys() == errors.keys():
        pictures.append(sweep_plots.size_maps(judged, "fig-sizes-perplexity", "perplexity", "{:.3f}"))
    return Section("Sizes", (), None, tuple(pictures))


def _perplexity(measured: Sequence[ReportRun], folder: Path) -> Section:
    judged = [run for run in measured if run.quality is not None]
    title = "Perplexity against size"
    if not judged:
        given = shlex.quote(f"{'model' if len(measured) == 1 else 'sweep'}={_from_here(folder)}")
        return Section(title, (f"Not evaluated yet: python -m globe.evaluate {given} does it.",))
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
    pictures = [sweep_plots.perplexity_front(judged)]
    diverge = [run for run in judged if run.kl]  # a lossless run has none, and no place on a logarithmic axis
    if len(diverge) > 1:
        pictures.append(sweep_plots.kl_front(diverge))
    return Section(title, tuple(said), None, tuple(pictures))


def _support(measured: Sequence[ReportRun]) -> Section | None:
    if len(measured) < 2:
        return None
    series = sweep_plots.support_series(measured)
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
    return Section("Convergence", (), None, (curve_plots.convergence(measured, with_steps),))


def _schedules(curves: Sequence[Track]) -> Section | None:
    picture = curve_plots.trajectories(curves)
    constant = curve_plots.constant_schedules(curves)
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
        "Share alpha_ij / sum_j alpha_ij of every atom in every expert, by its square root, and the colour of the page "
        "for none; above, how many experts use an atom; right, the error of each expert."
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
