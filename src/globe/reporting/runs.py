"""Runs as their folders tell of them: config.yaml, metrics.jsonl and summary.json are all that a report needs.

Beside them status.json says why a run has no figures, and evaluation.json has its perplexity. Nothing else is read, and
nothing here needs torch: a sweep can be reported where it was not run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from globe.config.identity import numerics
from globe.errors import ConfigError
from globe.files import read_record
from globe.runs.folder import RunFolder, State
from globe.runs.summary import RunSummary, read_summary

UNKNOWN = "unknown"
"""State of a run without a `status.json` that can't be told from its other files."""
_MARKS = {"status.json", "summary.json"}
_NOT_RUNS = {"banks", "wandb", "report"}
_EVALUATION_VERSION = 1


@dataclass(frozen=True, slots=True)
class Trace:
    """One bank's lines of `metrics.jsonl`, in order; None where a figure is missing or was not finite."""

    step: tuple[float | None, ...]
    seconds: tuple[float | None, ...]
    """of the fit, from its start; a resumed fit goes on counting"""
    relfrob: tuple[float | None, ...]
    temperature: tuple[float | None, ...]
    lam: tuple[float | None, ...]
    beta: tuple[float | None, ...]
    support_median: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Quality:
    """What `globe.evaluate` found for a run."""

    perplexity: float
    low: float | None
    """ends of the bootstrap interval"""
    high: float | None
    original: float | None
    """perplexity of the model before"""
    rise: tuple[float, float | None, float | None] | None
    """perplexity over that of the model before, less 1, with the ends of its paired bootstrap interval"""
    kl: float | None
    """KL(original || model) of the next token, nats"""
    kept_model: float | None
    """share of the whole model's parameters"""
    text: str
    """what was read, and how"""


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

    @property
    def banks_done(self) -> int:
        return 0 if self.summary is None else len(self.summary.banks)

    @property
    def measured(self) -> bool:
        """Is there a figure to draw?"""
        return self.banks_done > 0

    @property
    def support_median(self) -> float | None:
        """Median number of atoms per expert, over all banks."""
        if self.summary is None:
            return None
        sizes = sorted(size for bank in self.summary.banks for size in bank.supports)
        return (sizes[(len(sizes) - 1) // 2] + sizes[len(sizes) // 2]) / 2 if sizes else None


def read_runs(root: Path, *, key: str) -> tuple[ReportRun, ...]:
    """All runs in or below a folder, the smallest first, those without a figure last; `key` is the option's name.

    Raises ConfigError when it is no folder or holds no run.
    """
    if not root.is_dir():
        raise ConfigError(f"{key}={str(root)!r} is not a folder: give one below outputs/")
    if key == "run" and not _MARKS & set(os.listdir(root)):
        raise ConfigError(
            f"run={str(root)!r} is not the folder of a run (it has no status.json): give one, or sweep=FOLDER"
        )
    found = [read_run(folder, root) for folder in ([root] if key == "run" else _folders(root))]
    if not found:
        raise ConfigError(
            f"{key}={str(root)!r} holds no run of globe.train (no status.json in or below it): give the folder "
            "of a sweep or a run"
        )
    return tuple(replace(run, number=number) for number, run in enumerate(sorted(found, key=_order), start=1))


def _order(run: ReportRun) -> tuple[bool, float, str]:
    if run.summary is None or not run.measured:
        return True, 0.0, run.name
    return False, run.summary.kept, run.name


def _folders(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        below[:] = sorted(one for one in below if not one.startswith(".") and one not in _NOT_RUNS)
        if _MARKS & set(files):
            yield Path(folder)


def read_run(path: Path, root: Path) -> ReportRun:
    """One run; whatever is missing or damaged in its folder is left out."""
    folder = RunFolder(path)
    status, summary = folder.status, read_summary(folder.summary_file)
    traces = read_traces(folder.metrics_file)
    error = None if status is None else status.error
    if summary is None and folder.summary_file.exists():
        error = error or "summary.json is damaged, or of another version of GloBE"
    if status is not None and status.state is State.running:
        error = f"running, or killed: it has not ended since {status.started}"
    return ReportRun(
        number=0,
        name=path.resolve().name if path == root else path.relative_to(root).as_posix(),
        state=_told_by(summary, traces) if status is None else str(status.state),
        error=error,
        started=None if status is None else status.started,
        ended=None if status is None else status.ended,
        options=_read_options(folder.config_file),
        summary=summary,
        traces=traces,
        quality=read_quality(path / "evaluation.json"),
        banks_planned=max(
            0 if status is None else len(status.banks),
            0 if summary is None else len(summary.banks) + len(summary.failed),
        ),
    )


def _told_by(summary: RunSummary | None, traces: dict[str, Trace]) -> str:
    """Finished, where no bank failed and none was begun that the summary lacks; it is written bank by bank."""
    if summary is None or summary.failed or traces.keys() - {bank.key for bank in summary.banks}:
        return UNKNOWN
    return str(State.finished)


def _read_options(file: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return {}
    if not isinstance(config, dict):
        return {}
    plain = {str(key): value for key, value in config.items()}
    with suppress(KeyError, TypeError, AttributeError):  # the options of another version
        plain = numerics(plain)
    return dict(_flat(plain))


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_traces(file: Path) -> dict[str, Trace]:
    """The curves of every bank; a line that was cut by a kill is passed over."""
    names = [one.name for one in fields(Trace)]
    columns: dict[str, dict[str, list[float | None]]] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    for line in lines:
        try:
            record = json.loads(line)
            bank = str(record["bank"])
        except (ValueError, KeyError, TypeError):
            continue
        own = columns.setdefault(bank, {name: [] for name in names})
        for name in names:
            own[name].append(_number(record.get(name)))
    return {bank: Trace(**{name: tuple(own[name]) for name in names}) for bank, own in columns.items()}


def read_quality(file: Path) -> Quality | None:
    """The result of `globe.evaluate` in a run's folder; None if there is none, or none of this version."""
    record = read_record(file)
    if record is None or record.get("format_version") != _EVALUATION_VERSION:
        return None
    try:
        own, before = record["perplexity"], record["perplexity_original"]
        interval, settings = own["perplexity_interval"], record["settings"]
        far, sizes = record["divergence"], record["sizes"]["model_parameters"]
        perplexity = _number(own["perplexity"])
        text = f"{settings['text']}, {settings['counted_tokens']:,} tokens, window {settings['window']}"
        if perplexity is None:
            return None
        return Quality(
            perplexity=perplexity,
            low=None if interval is None else _number(interval[0]),
            high=None if interval is None else _number(interval[1]),
            original=None if before is None else _number(before["perplexity"]),
            rise=_rise(record["rise"]),
            kl=None if far is None else _number(far["kl"]),
            kept_model=_number(sizes.get("ratio")),
            text=text,
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def _rise(record: dict[str, Any] | None) -> tuple[float, float | None, float | None] | None:
    """Of one model over another on the same windows, whose interval is far narrower than that of either."""
    if record is None or (ratio := _number(record["ratio"])) is None:
        return None
    low, high = record["ratio_interval"] or (None, None)
    ends = (_number(low), _number(high))
    return (ratio - 1, *(None if end is None else end - 1 for end in ends))  # type: ignore[return-value]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
