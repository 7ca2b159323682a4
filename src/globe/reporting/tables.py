"""The tables of a report: rows made of columns, each of which knows its heading, its meaning and its cells.

A table is rendered as HTML, Markdown, LaTeX and CSV (`globe.reporting.documents`); what differs between them is the
form alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median, stdev
from typing import Any

from globe.errors import printable
from globe.reporting.front import BITS, fronts, size_axis
from globe.reporting.labels import SEED, alike_but, methods_of, option_text
from globe.reporting.runs import ReportRun
from globe.runs.summary import BankReport


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    value: float | str | None
    """to sort by, with every digit; None goes last"""


@dataclass(frozen=True, slots=True)
class Column:
    heading: str
    meaning: str
    """shown when the heading is pointed at, and in the list of columns; empty where the heading says all"""
    cell: Callable[[Any], Cell]


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    marked: frozenset[int] = frozenset()
    """rows that are set apart: those of a front"""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """For each column, whether all its values are numbers."""
        return tuple(
            all(not isinstance(row[at].value, str) for row in self.rows) for at in range(len(self.columns))
        )


def make_table(
    name: str,
    caption: str,
    columns: Sequence[Column],
    items: Sequence[Any],
    marked: frozenset[int] = frozenset(),
) -> Table:
    """Return the table with one row for each item."""
    rows = tuple(tuple(column.cell(item) for column in columns) for item in items)
    return Table(name, caption, tuple(columns), rows, marked)


def number(value: float | int | None, form: str = "{:g}") -> Cell:
    """Return the cell of a number; a dash for None."""
    return Cell("-", None) if value is None else Cell(form.format(value), float(value))


def words(value: object) -> Cell:
    """Return the cell of a text, made printable; a dash for None or an empty text."""
    text = "" if value is None else printable(str(value))
    return Cell(text or "-", text or None)


def run_table(runs: Sequence[ReportRun], varied: Sequence[str]) -> Table:
    """Return one row per run that has a figure; those of the Pareto front are marked."""
    chosen = [run for run in runs if run.measured]
    front = {run.number for members in fronts(runs).values() for run in members}
    marked = frozenset(at for at, run in enumerate(chosen) if run.number in front)
    columns = [
        Column(
            "#", "number of the run in this report, the smallest run first", lambda run: number(run.number)
        ),
        *(_option_column(name) for name in varied),
        *_differing(chosen, varied),
        *(column for column in _SIZES if column is not _BITS_A_WEIGHT or size_axis(chosen) is BITS),
        *(_QUALITY if any(run.quality is not None for run in chosen) else ()),
        Column("steps", "steps of all banks", lambda run: number(sum(bank.steps for bank in _banks(run)))),
        Column(
            "fit (s)", "seconds that the fits of all banks took", lambda run: number(_seconds(run), "{:.3g}")
        ),
        Column("folder", "folder of the run", lambda run: words(run.name)),
    ]
    return make_table(
        "runs", "All runs with a figure. Those of the Pareto front are bold.", columns, chosen, marked
    )


def _differing(runs: Sequence[ReportRun], varied: Sequence[str]) -> list[Column]:
    """Return the columns that are shown where runs differ in them."""
    found = []
    if len({methods_of(run) for run in runs}) > 1 and "method" not in varied:
        found.append(Column("method", "", lambda run: words(methods_of(run))))
    if len({run.caches for run in runs}) > 1 or any(len(run.caches) > 1 for run in runs):
        meaning = "bases that stay composed per layer and family; runs that differ in it alone share a fit and a row"
        found.append(Column("S_cache", meaning, lambda run: words(", ".join(run.caches))))
    if len({run.state for run in runs}) > 1:
        found.append(Column("state", "", lambda run: words(run.state)))
    if any(run.banks_done > 1 for run in runs):
        found.append(Column("banks", "banks that are done", lambda run: number(run.banks_done)))
    return found


def _option_column(name: str) -> Column:
    meaning = "option of globe.train in which the runs differ"
    return Column(name, meaning, lambda run: _option(name, run.options.get(name)))


def _option(name: str, value: Any) -> Cell:
    text = option_text(name, value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(text, float(value))
    return Cell(text, text)


def _banks(run: ReportRun) -> tuple[BankReport, ...]:
    return () if run.summary is None else run.summary.banks


def _seconds(run: ReportRun) -> float | None:
    times = [] if run.summary is None else [one.seconds for one in run.summary.runtimes.values()]
    return sum(times) if times else None


def _of_summary(name: str, form: str) -> Callable[[ReportRun], Cell]:
    def cell(run: ReportRun) -> Cell:
        assert run.summary is not None
        value = getattr(run.summary, name)
        return number(value() if callable(value) else value, form)

    return cell


def _of_quality(value: Callable[[Any], float | None], form: str) -> Callable[[ReportRun], Cell]:
    return lambda run: number(None if run.quality is None else value(run.quality), form)


def _range(values: Sequence[int]) -> Cell:
    low, high = min(values), max(values)
    return Cell(str(low) if low == high else f"{low}-{high}", float(low))


_ATOM_RANK = (
    "k: rank of the m atoms where they are stored as products of two factors; dense where they are not"
)
_BITS_A_WEIGHT = Column(
    "bits a weight",
    "bits of the artefacts, for each weight of the compressed matrices",
    _of_summary("bits", "{:.2f}"),
)
_SIZES = (
    Column("m", "atoms of a bank", lambda run: _range([bank.m for bank in _banks(run)])),
    Column("r", "rows of an atom", lambda run: _range([bank.r for bank in _banks(run)])),
    Column("support", "median number of atoms that an expert uses", lambda run: number(run.support_median)),
    Column(
        "kept of family",
        "parameters that are left, of the compressed matrices",
        _of_summary("kept", "{:.1%}"),
    ),
    _BITS_A_WEIGHT,
    Column(
        "kept of model", "parameters that are left, of the whole model", _of_summary("kept_model", "{:.2%}")
    ),
    Column(
        "RelFrob start",
        "relative Frobenius error after the warm start, before the first step, mean over the banks",
        lambda run: number(mean(bank.relfrob_start for bank in _banks(run)), "{:.4f}"),
    ),
    Column(
        "RelFrob",
        "relative Frobenius error of what was saved, |W - W'| / |W| over all experts of a bank, mean over the banks",
        _of_summary("relfrob", "{:.4f}"),
    ),
)
_QUALITY = (
    Column(
        "perplexity", "of the patched model, per token", _of_quality(lambda one: one.perplexity, "{:.4f}")
    ),
    Column(
        "rise",
        "of the perplexity over the original's on the same text",
        _of_quality(lambda one: None if one.rise is None else one.rise[0], "{:+.3%}"),
    ),
    Column(
        "KL (nats)",
        "divergence of the patched model's next token from the original's, mean over the text",
        _of_quality(lambda one: one.kl, "{:.3g}"),
    ),
)


def bank_table(run: ReportRun) -> Table:
    """Return one row per bank of a run."""
    runtimes = {} if run.summary is None else run.summary.runtimes
    low_rank = any(bank.atom_rank is not None for bank in _banks(run))
    rank = Column("k", _ATOM_RANK, lambda bank: _option("bank.atom_rank", bank.atom_rank))

    def seconds(bank: BankReport) -> Cell:
        return number(runtimes[bank.key].seconds if bank.key in runtimes else None, "{:.3g}")

    columns = [
        Column("bank", "layer and family of the experts", lambda bank: words(bank.key)),
        Column(
            "n x p x d",
            "experts, rows and columns of each",
            lambda bank: words(f"{bank.n} x {bank.p} x {bank.d}"),
        ),
        Column("m", "atoms", lambda bank: number(bank.m)),
        Column("r", "rows of an atom", lambda bank: number(bank.r)),
        *([rank] if low_rank else []),
        Column(
            "support",
            "median number of atoms that an expert uses",
            lambda bank: number(median(bank.supports)),
        ),
        Column("kept of family", "parameters that are left", lambda bank: number(bank.kept, "{:.1%}")),
        Column(
            "RelFrob start", "error after the warm start", lambda bank: number(bank.relfrob_start, "{:.4f}")
        ),
        Column("RelFrob", "error of what was saved", lambda bank: number(bank.relfrob, "{:.4f}")),
        Column(
            "effective rank",
            "singular values that hold 95 % of an expert's energy, mean over the experts",
            lambda bank: number(bank.metrics.get("effective_rank_mean"), "{:.1f}"),
        ),
        Column("steps", "", lambda bank: number(bank.steps)),
        Column("fit (s)", "seconds that the fit took", seconds),
    ]
    return make_table("banks", "All banks of the run.", columns, _banks(run))


def seed_table(runs: Sequence[ReportRun], varied: Sequence[str]) -> Table | None:
    """Return one row per group of runs that differ in their seed alone; None if no two runs do."""
    groups = [group for group in alike_but(runs, SEED) if len({run.options.get(SEED) for run in group}) > 1]
    if not groups:
        return None

    def figure(name: str, value: Callable[[ReportRun], float | None]) -> list[Column]:
        known: Callable[[list[ReportRun]], list[float]] = lambda group: [
            found for run in group if (found := value(run)) is not None
        ]
        return [
            Column(
                f"{name} mean",
                "",
                lambda group: number(mean(known(group)) if known(group) else None, "{:.5g}"),
            ),
            Column(
                f"{name} deviation",
                "standard deviation over the seeds, with one less than their number in the denominator",
                lambda group: number(stdev(known(group)) if len(known(group)) > 1 else None, "{:.2g}"),
            ),
        ]

    columns = [
        Column(
            "runs", "numbers of the runs", lambda group: words(", ".join(f"#{run.number}" for run in group))
        ),
        *(_of_first(_option_column(name)) for name in varied if name != SEED),
        Column("seeds", "", lambda group: number(len(group))),
        *figure("RelFrob", lambda run: run.relfrob),
    ]
    if any(run.quality is not None for group in groups for run in group):
        columns += figure("perplexity", lambda run: run.perplexity)
    return make_table("seeds", "Runs that differ in their seed alone.", columns, groups)


def _of_first(column: Column) -> Column:
    return replace(column, cell=lambda group: column.cell(group[0]))


def trouble_table(runs: Sequence[ReportRun]) -> Table:
    """Return one row per run that is not finished, with the reason; a run with failed banks names each."""

    def reason(run: ReportRun) -> Cell:
        failed = {} if run.summary is None else run.summary.failed
        return words("; ".join([f"{key}: {why}" for key, why in failed.items()] or [run.error or ""]))

    def done(run: ReportRun) -> Cell:
        text = f"{run.banks_done} of {run.banks_planned}" if run.banks_planned else "0"
        return Cell(text, float(run.banks_done))

    columns = [
        Column("#", "", lambda run: number(run.number)),
        Column("run", "folder of the run", lambda run: words(run.name)),
        Column("state", "", lambda run: words(run.state)),
        Column("banks done", "", done),
        Column("reason", "", reason),
    ]
    unfinished = [run for run in runs if run.state != "finished"]
    return make_table("unfinished", "Runs that are not finished, and why.", columns, unfinished)
