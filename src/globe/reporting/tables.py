"""The tables of a report, and `runs.csv`: one line per run and bank."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from globe.reporting.front import fronts
from globe.reporting.labels import methods_of, option_text
from globe.reporting.runs import ReportRun
from globe.runs.summary import BankReport


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    value: float | str | None
    """to sort by; None goes last"""


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    marked: frozenset[int] = frozenset()
    """rows that are set apart: those of a front"""


def number(value: float | int | None, form: str = "{:g}") -> Cell:
    """A cell of a number; a dash for None."""
    return Cell("-", None) if value is None else Cell(form.format(value), float(value))


def words(value: object) -> Cell:
    text = "" if value is None else str(value)
    return Cell(text or "-", text or None)


def run_table(runs: Sequence[ReportRun], varied: Sequence[str]) -> Table:
    """One row per run that has a figure."""
    chosen = [run for run in runs if run.measured]
    methods = len({methods_of(run) for run in chosen}) > 1 and "method" not in varied
    several = any(run.banks_done > 1 for run in chosen)
    judged = any(run.quality is not None for run in chosen)
    headings = ["#", *(["run"] if not varied else list(varied))]
    headings += ["method"] if methods else []
    headings += ["banks"] if several else []
    headings += ["m", "r", "median support", "kept of family", "kept of model", "RelFrob start", "RelFrob"]
    headings += ["perplexity", "rise", "KL (nats)"] if judged else []
    unlike = len({run.state for run in chosen}) > 1
    headings += ["steps", "fit (s)", *(["state"] if unlike else [])]
    front = {run.number for members in fronts(runs).values() for run in members}
    rows = []
    for run in chosen:
        assert run.summary is not None
        summary, banks = run.summary, run.summary.banks
        cells = [number(run.number)]
        cells += (
            [_option(name, run.options.get(name)) for name in varied]
            if varied
            else [Cell(run.name, run.name)]
        )
        cells += [words(methods_of(run))] if methods else []
        cells += [number(run.banks_done)] if several else []
        cells += [
            _range([bank.m for bank in banks]),
            _range([bank.r for bank in banks]),
            number(run.support_median),
            number(summary.kept, "{:.1%}"),
            number(summary.kept_model(), "{:.2%}"),
            number(sum(bank.relfrob_start for bank in banks) / len(banks), "{:.4f}"),
            number(summary.relfrob, "{:.4f}"),
        ]
        if judged:
            quality = run.quality
            cells += [
                number(None if quality is None else quality.perplexity, "{:.4f}"),
                number(None if quality is None or quality.rise is None else quality.rise[0], "{:+.3%}"),
                number(None if quality is None else quality.kl, "{:.3g}"),
            ]
        times = [runtime.seconds for runtime in summary.runtimes.values()]
        cells += [
            number(sum(bank.steps for bank in banks)),
            number(sum(times) if times else None, "{:.1f}"),
            *([words(run.state)] if unlike else []),
        ]
        rows.append(tuple(cells))
    marked = frozenset(at for at, run in enumerate(chosen) if run.number in front)
    return Table("runs", tuple(headings), tuple(rows), marked)


def bank_table(runs: Sequence[ReportRun]) -> Table:
    """One row per bank of the runs that have several."""
    rows = []
    for run in runs:
        if run.summary is None or run.banks_done < 2:
            continue
        for bank in run.summary.banks:
            runtime = run.summary.runtimes.get(bank.key)
            rows.append(
                (
                    number(run.number),
                    words(bank.key),
                    words(f"{bank.n} x {bank.p} x {bank.d}"),
                    number(bank.m),
                    number(bank.r),
                    number(median(bank.supports)),
                    number(bank.kept, "{:.1%}"),
                    number(bank.relfrob_start, "{:.4f}"),
                    number(bank.relfrob, "{:.4f}"),
                    number(bank.metrics.get("effective_rank_mean"), "{:.1f}"),
                    number(bank.steps),
                    number(None if runtime is None else runtime.seconds, "{:.1f}"),
                )
            )
    headings = (
        "#",
        "bank",
        "n x p x d",
        "m",
        "r",
        "median support",
        "kept of family",
        "RelFrob start",
        "RelFrob",
    )
    return Table("banks", (*headings, "effective rank", "steps", "fit (s)"), tuple(rows))


def trouble_table(runs: Sequence[ReportRun]) -> Table:
    """One row per run that is not finished, with the reason; a run with failed banks names each."""
    rows = []
    for run in runs:
        if run.state == "finished":
            continue
        failed = {} if run.summary is None else run.summary.failed
        reasons = [f"{key}: {reason}" for key, reason in failed.items()] or [run.error or ""]
        done = f"{run.banks_done} of {run.banks_planned}" if run.banks_planned else "0"
        rows.append(
            (
                number(run.number),
                words(run.name),
                words(run.state),
                Cell(done, float(run.banks_done)),
                words("; ".join(reasons)),
            )
        )
    return Table("unfinished", ("#", "run", "state", "banks done", "reason"), tuple(rows))


def _option(name: str, value: Any) -> Cell:
    text = option_text(name, value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(text, float(value))
    return Cell(text, text)


def _range(values: Sequence[int]) -> Cell:
    low, high = min(values), max(values)
    return Cell(str(low) if low == high else f"{low}-{high}", float(low))


_BANK_COLUMNS = (
    *(
        "method",
        "n",
        "p",
        "d",
        "m",
        "r",
        "atom_rank",
        "target_support",
        "parameters",
        "kept_parameters",
        "kept",
    ),
    *(
        "relfrob_start",
        "relfrob_fit",
        "relfrob",
        "steps",
        "accepted",
        "rejected",
        "export_dtype",
        "stop",
        "seed",
    ),
)
_RUNTIME_COLUMNS = ("seconds", "seconds_total", "steps_per_second", "peak_host_bytes", "peak_device_bytes")


def runs_csv(runs: Sequence[ReportRun], varied: Sequence[str]) -> str:
    """One line per run and bank with every digit; a run without a bank has one line."""
    front = {run.number for members in fronts(runs).values() for run in members}
    lines = [_line(run, bank, varied, front) for run in runs for bank in _banks(run)]
    names = list(dict.fromkeys(name for line in lines for name in line))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _banks(run: ReportRun) -> Sequence[BankReport | None]:
    return run.summary.banks if run.summary is not None and run.summary.banks else (None,)


def _line(run: ReportRun, bank: BankReport | None, varied: Sequence[str], front: set[int]) -> dict[str, Any]:
    summary, quality = run.summary, run.quality
    line: dict[str, Any] = {"number": run.number, "run": run.name, "state": run.state, "error": run.error}
    line |= {f"option.{name}": run.options.get(name) for name in varied}
    line |= {"bank": None if bank is None else bank.key}
    line |= {name: None if bank is None else getattr(bank, name) for name in _BANK_COLUMNS}
    line["support_median"] = None if bank is None else median(bank.supports)
    line["effective_rank"] = None if bank is None else bank.metrics.get("effective_rank_mean")
    runtime = None if summary is None or bank is None else summary.runtimes.get(bank.key)
    line |= {name: None if runtime is None else getattr(runtime, name) for name in _RUNTIME_COLUMNS}
    done = summary is not None and run.measured
    line["run_relfrob"] = summary.relfrob if done and summary is not None else None
    line["run_kept"] = summary.kept if done and summary is not None else None
    line["run_kept_model"] = summary.kept_model() if done and summary is not None else None
    line["run_on_front"] = run.number in front
    for at, name in enumerate(("perplexity_rise", "perplexity_rise_low", "perplexity_rise_high")):
        line[name] = None if quality is None or quality.rise is None else quality.rise[at]
    for name in ("perplexity", "low", "high", "original", "kl"):
        column = name if name in ("perplexity", "kl") else f"perplexity_{name}"
        line[column] = None if quality is None else getattr(quality, name)
    return line
