"""Runs as their folders tell of them: config.yaml, metrics.jsonl and summary.json are all that a report needs.

Beside them status.json says why a run has no figures, and evaluation.json has its perplexity. Nothing else is read, and
nothing here needs torch: a sweep can be reported where it was not run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from globe.errors import ConfigError, printable
from globe.reporting.run_files import Quality, Trace, fault_of, read_options, read_quality, read_traces
from globe.runs.allocation import FILE, Allocation, read_allocation
from globe.runs.folder import RunFolder, State
from globe.runs.summary import RunSummary, read_summary

UNKNOWN, UNREADABLE = "unknown", "unreadable"
"""States of a run whose files do not tell its state, and of one that can't be read at all."""
_MARKS = {"status.json", "summary.json"}
_NOT_RUNS = {"banks", "wandb", "report"}


@dataclass(frozen=True, slots=True)
class ReportRun:
    number: int
    """from 1, as in tables and pictures"""
    name: str
    """its folder, below the folder of the report's runs"""
    state: str
    error: str | None
    started: str | None
    ended: str | None
    options: dict[str, Any]
    """those that change numbers, flat (`bank.m`); nothing if the run has no readable config.yaml"""
    summary: RunSummary | None
    """None before the first bank is done"""
    traces: dict[str, Trace]
    quality: Quality | None
    banks_planned: int
    """as many as the run has told of so far"""
    caches: tuple[str, ...] = ()
    """`S_cache` of the run, and of those that share its fit and stand for nothing else in the report"""
    allocation: Allocation | None = None
    """the shares of its banks, of budget.over=model"""

    @property
    def banks_done(self) -> int:
        return 0 if self.summary is None else len(self.summary.banks)

    @property
    def measured(self) -> bool:
        """Is there a figure to draw?"""
        return self.banks_done > 0

    @property
    def relfrob(self) -> float | None:
        """RelFrob, mean over the banks."""
        return None if self.summary is None else self.summary.relfrob

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the patched model."""
        return None if self.quality is None else self.quality.perplexity

    @property
    def kl(self) -> float | None:
        """KL(original || patched model) of the next token in nats."""
        return None if self.quality is None else self.quality.kl

    @property
    def support_median(self) -> float | None:
        """Median number of atoms per expert, over all banks."""
        if self.summary is None:
            return None
        sizes = sorted(size for bank in self.summary.banks for size in bank.supports)
        return (sizes[(len(sizes) - 1) // 2] + sizes[len(sizes) // 2]) / 2 if sizes else None


def read_runs(root: Path, *, key: str) -> tuple[ReportRun, ...]:
    """Return all runs in or below a folder, the smallest first, those without a figure last.

    Finished runs that differ in `S_cache` alone are one. `key` is the option that named the folder.

    Raises
    ------
    ConfigError if it is no folder or holds no run.
    """
    if not root.is_dir():
        raise ConfigError(f"{key}={str(root)!r} is not a folder: give one below outputs/")
    if key == "run" and not _MARKS & set(os.listdir(root)):
        raise ConfigError(
            f"run={str(root)!r} is not the folder of a run (it has no status.json): give one, or sweep=FOLDER"
        )
    folders = [root] if key == "run" else list(run_folders(root))
    if not folders:
        raise ConfigError(
            f"{key}={str(root)!r} holds no run of globe.train (no status.json in or below it): give the folder "
            "of a sweep or a run"
        )
    found = sorted(_one_fit_each([read_run(folder, root) for folder in folders]), key=_order)
    return tuple(replace(run, number=number) for number, run in enumerate(found, start=1))


def _order(run: ReportRun) -> tuple[bool, float, str]:
    if run.summary is None or not run.measured:
        return True, 0.0, run.name
    return False, run.summary.kept, run.name


def run_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of all runs in or below a folder."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(one for one in below if not one.startswith(".") and one not in _NOT_RUNS)
        if _MARKS & set(files):
            yield Path(folder)


def _one_fit_each(runs: Sequence[ReportRun]) -> list[ReportRun]:
    """Return the runs with those of one fit joined: by its first folder, with all `S_cache`s, and its evaluation."""
    fits: dict[str, ReportRun] = {}
    for run in runs:
        banks = () if run.summary is None or run.state != State.finished else run.summary.banks
        figures = [(bank.key, bank.relfrob, bank.kept_parameters) for bank in banks]
        fit = json.dumps([run.options, figures] if figures and run.options else run.name, sort_keys=True)
        first = fits.setdefault(fit, run)
        if not set(run.caches) & set(first.caches) and first is not run:
            caches = tuple(sorted({*first.caches, *run.caches}))
            fits[fit] = replace(first, caches=caches, quality=first.quality or run.quality)
        elif first is not run:
            fits[f"{fit} {run.name}"] = run
    return list(fits.values())


def read_run(path: Path, root: Path) -> ReportRun:
    """Return one run; what is missing or damaged in its folder is left out, and said in `error`."""
    name = printable(path.resolve().name if path == root else path.relative_to(root).as_posix())
    try:
        return _read(path, name)
    except Exception as error:  # of whatever kind: the other runs are to be reported all the same
        reason = f"its files can't be read: {printable(str(error) or type(error).__name__)}"
        return ReportRun(0, name, UNREADABLE, reason, None, None, {}, None, {}, None, 0)


def _read(path: Path, name: str) -> ReportRun:
    folder = RunFolder(path)
    status, summary = folder.status, read_summary(folder.summary_file)
    traces = read_traces(folder.metrics_file)
    error = None if status is None else status.error
    fault = None if summary is None else fault_of(summary)
    if fault is not None:
        summary, error = None, f"summary.json is damaged ({fault}): overwrite=true repeats the run"
    elif summary is None and folder.summary_file.exists():
        error = error or "summary.json is damaged, or of another version of GloBE"
    if status is not None and status.state is State.running:
        error = f"running, or killed: it has not ended since {status.started}"
    state = _told_by(summary, traces) if status is None else str(status.state)
    if fault is not None or (state == State.finished and summary is None):
        state = UNREADABLE
    return ReportRun(
        number=0,
        name=name,
        state=state,
        error=None if error is None else printable(str(error)),
        started=None if status is None else _time(status.started),
        ended=None if status is None else _time(status.ended),
        options=read_options(folder.config_file),
        summary=summary,
        traces=traces,
        quality=read_quality(path / "evaluation.json"),
        banks_planned=max(
            0 if status is None else len(status.banks),
            0 if summary is None else len(summary.banks) + len(summary.failed),
        ),
        caches=() if summary is None else (printable(str(summary.S_cache)),),
        allocation=read_allocation(path / FILE),
    )


def _time(value: object) -> str | None:
    return printable(value) if isinstance(value, str) else None


def _told_by(summary: RunSummary | None, traces: dict[str, Trace]) -> str:
    """Return finished, where no bank failed and none was begun that the summary lacks; it is written bank by bank."""
    if summary is None or summary.failed or traces.keys() - {bank.key for bank in summary.banks}:
        return UNKNOWN
    return str(State.finished)
