"""The figures of a run, as records, as `summary.json` and as the table printed at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from globe.config.console import add_row, new_table, say, show_table, wide_console
from globe.files import parse_record, plain_record, read_record
from globe.runs.chart_data import BankCharts

_log = logging.getLogger(__name__)
FORMAT_VERSION = 1
_SHOWN_GROUPS = 6
"""Families or layers at most whose figures are printed after a run."""


@dataclass(frozen=True, slots=True)
class BankReport:
    """Figures of one bank that equal runs share: they go into the artefact as well."""

    key: str
    n: int
    p: int
    d: int
    m: int
    r: int
    target_support: int | None
    parameters: int
    """of the dense experts, n p d"""
    kept_parameters: int
    """adapters, atoms, codes and the stored means; k (r + d) for a low-rank atom. Baselines in their tightest form"""
    relfrob_start: float
    """after the warm start, before the first step; in the metric of the fit (`normalise.metric`)"""
    relfrob_fit: float
    """of the fitted factors, before pruning and export; in the metric of the fit"""
    relfrob: float
    """of the artefact: after pruning, in the exported dtype"""
    export_dtype: str
    stop: str
    """why the fit ended"""
    steps: int
    accepted: int
    rejected: int
    regularised_solves: int
    seed: int
    """of the bank's generator"""
    attempt: int
    supports: tuple[int, ...]
    """atoms each expert uses"""
    atom_usage: tuple[int, ...]
    """experts that use each atom"""
    expert_relfrob: tuple[float, ...]
    """RelFrob of each expert"""
    metrics: dict[str, float | None]
    """further figures, by name; None stands for an infinite one"""
    method: str = "globe"
    atom_rank: int | None = None
    """k of low-rank atoms; None for dense ones"""
    charts: BankCharts | None = None
    """what the report draws; None in the summaries of earlier versions, which had none"""

    @property
    def kept(self) -> float:
        """The share of the family's own parameters that is kept."""
        return self.kept_parameters / self.parameters

    def to_dict(self) -> dict[str, Any]:
        return plain_record(self) | {"kept": self.kept, "support_median": median(self.supports)}

    @staticmethod
    def from_dict(record: dict[str, Any]) -> BankReport:
        """Read the record. Raises ValueError when the record was written by another version."""
        return parse_record(BankReport, record)


@dataclass(frozen=True, slots=True)
class BankRuntime:
    """Figures that differ between equal runs."""

    seconds: float
    """of the fit alone"""
    seconds_total: float
    """with reading, warm start, final figures and writing"""
    seconds_coding: float
    seconds_dictionary: float
    seconds_refit: float
    steps_per_second: float
    experts_per_second: float
    """experts read, fitted and written, by all seconds"""
    read_bytes_per_second: float
    peak_host_bytes: int | None
    """largest resident memory of the process until the bank's end"""
    peak_device_bytes: int | None


@dataclass(frozen=True, slots=True)
class RunSummary:
    name: str
    source: dict[str, Any]
    """id, revision and model_type of the checkpoint"""
    stamp: str
    """of the checkpoint's files, to notice that they were changed"""
    total_parameters: int
    """of the whole model"""
    device: str
    banks: tuple[BankReport, ...] = ()
    runtimes: dict[str, BankRuntime] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """key of each bank that failed, with the reason"""
    seconds: float = 0.0
    metrics: dict[str, float | None] = field(default_factory=dict)
    """figures of more than one bank"""
    S_cache: int | str = "all"
    """experts per layer and family whose bases stay composed in the patched model"""
    cache_bytes: dict[str, int] = field(default_factory=dict)
    """of each bank's composed bases at this S_cache, in the exported dtype"""

    @property
    def relfrob(self) -> float:
        """Mean over the banks; NaN for none."""
        return sum(bank.relfrob for bank in self.banks) / len(self.banks) if self.banks else math.nan

    def mse(self) -> dict[str, Any]:
        """Return MSE_F, the mean squared error of an entry: its mean over all banks, over each family and each layer.

        A bank that several families or layers share counts for each group by the name that its key has for it.
        """
        families: dict[str, list[float]] = {}
        layers: dict[str, list[float]] = {}
        for bank in self.banks:
            figure = bank.metrics.get("mse")
            if figure is not None:
                layer, _, family = bank.key.rpartition(".")
                families.setdefault(family, []).append(figure)
                layers.setdefault(layer, []).append(figure)
        every = [one for figures in families.values() for one in figures]
        return {
            "mean": mean(every) if every else None,
            "families": {key: mean(figures) for key, figures in families.items()},
            "layers": {key: mean(figures) for key, figures in layers.items()},
        }

    @property
    def kept(self) -> float:
        """Share of the parameters of all compressed experts that is kept; NaN for no bank."""
        dense = sum(bank.parameters for bank in self.banks)
        return sum(bank.kept_parameters for bank in self.banks) / dense if dense else math.nan

    @property
    def bits(self) -> float:
        """Bits a weight of all compressed experts, as their artefacts hold them; NaN for no bank.

        A bank whose record has no bytes, as earlier versions wrote it, counts 16 bits for every number.
        """
        dense = sum(bank.parameters for bank in self.banks)
        held = sum(bank.metrics.get("bytes") or 2 * bank.kept_parameters for bank in self.banks)
        return 8 * held / dense if dense else math.nan

    @property
    def rounded(self) -> bool:
        """Whether factors are stored in fewer bits than those of bfloat16."""
        return self.bits < 15 * self.kept

    @property
    def failure(self) -> str:
        """One sentence for the banks that failed."""
        names = ", ".join(self.failed)
        if len(self.failed) == 1:
            return f"{names} failed: {next(iter(self.failed.values()))}"
        count = len(self.failed) + len(self.banks)
        return f"{len(self.failed)} of {count} banks failed ({names}): the same command tries them once more"

    def kept_model(self, banks: Sequence[BankReport] | None = None) -> float:
        """Share of the whole model's parameters that is left when these banks (all) replace their experts."""
        chosen = self.banks if banks is None else banks
        saved = sum(bank.parameters - bank.kept_parameters for bank in chosen)
        return 1 - saved / self.total_parameters

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON. A figure that is not finite is null."""
        banks = []
        for bank in self.banks:
            runtime = self.runtimes.get(bank.key)
            record = bank.to_dict() | {"kept_model": self.kept_model([bank])}
            banks.append(record | {"runtime": None if runtime is None else plain_record(runtime)})
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "source": self.source,
            "stamp": self.stamp,
            "total_parameters": self.total_parameters,
            "relfrob": _finite(self.relfrob),
            "mse": self.mse(),
            "kept": _finite(self.kept),
            "kept_model": self.kept_model(),
            "seconds": self.seconds,
            "device": self.device,
            "metrics": self.metrics,
            "S_cache": self.S_cache,
            "cache_bytes": self.cache_bytes,
            "failed": self.failed,
            "banks": banks,
        }

    @staticmethod
    def from_dict(record: dict[str, Any]) -> RunSummary:
        """Read the record. Raises KeyError, TypeError or ValueError when the record was written by another version."""
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"summary.json has format version {record['format_version']!r}")
        runtimes = {bank["key"]: bank["runtime"] for bank in record["banks"] if bank["runtime"]}
        return parse_record(RunSummary, record | {"runtimes": runtimes})


def read_summary(path: Path) -> RunSummary | None:
    """Return the summary in a file; None when there is none or, with a warning, when it is not one of this version."""
    record = read_record(path)
    try:
        return None if record is None else RunSummary.from_dict(record)
    except (KeyError, TypeError, ValueError):
        _log.warning("%s is ignored, it is damaged or of another version", path)
        return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def print_summary(
    summary: RunSummary, folder: Path, console: Console | None = None, dense: bool = False
) -> None:
    """Print the table of a run, and what comes next; `dense` says that the model can't run with factors."""
    console = wide_console(console)
    show_table(console, summary_table(summary))
    for line in _footer(summary, folder, dense):
        say(console, line)


def summary_table(summary: RunSummary) -> Table:
    """Return a table with a row for each bank, and a row for all where there are several.

    An error at the start in another metric is left out, since the end is not to be compared with it.
    """
    banks = summary.banks
    methods = {bank.method for bank in banks} - {"globe"}
    title = summary.name if not methods else f"{summary.name}: {', '.join(sorted(methods))}"
    weighted = [bank.metrics.get("relfrob_metric") for bank in banks]
    known = [one for one in weighted if one is not None]
    pairs = zip(banks, weighted, strict=True)
    starts = [bank.relfrob_start if one is None else None for bank, one in pairs]
    times = [None if (one := summary.runtimes.get(bank.key)) is None else one.seconds for bank in banks]
    columns = [  # heading, cells of the banks, cell of all together
        ("bank", [bank.key for bank in banks], f"all {len(banks)}"),
        (
            "n x p x d",
            [f"{bank.n} x {bank.p} x {bank.d}" for bank in banks],
            f"{sum(bank.n for bank in banks)} experts",
        ),
        ("m", [str(bank.m) for bank in banks], ""),
        ("r", [str(bank.r) for bank in banks], ""),
        ("k", [_figure(bank.atom_rank, "d") for bank in banks], ""),
        ("kept of\nfamily", [f"{bank.kept:.1%}" for bank in banks], f"{summary.kept:.1%}"),
        (
            "kept of\nmodel",
            [f"{summary.kept_model([bank]):.1%}" for bank in banks],
            f"{summary.kept_model():.1%}",
        ),
        (
            "RelFrob\nstart",
            [_figure(one, ".4f") for one in starts],
            f"{mean(one or 0.0 for one in starts):.4f}" if banks and not known else "",
        ),
        ("RelFrob\nend", [f"{bank.relfrob:.4f}" for bank in banks], f"{summary.relfrob:.4f}"),
        ("in the\nmetric", [_figure(one, ".4f") for one in weighted], _figure(mean(known or [0.0]), ".4f")),
        ("support\nmedian", [f"{median(bank.supports):g}" for bank in banks], f"{median_support(summary):g}"),
        ("steps", [str(bank.steps) for bank in banks], str(sum(bank.steps for bank in banks))),
        ("seconds", [_figure(one, ".1f") for one in times], f"{sum(one or 0.0 for one in times):.1f}"),
    ]
    optional = ("k", "in the\nmetric")
    columns = [one for one in columns if one[0] not in optional or any(cell != "-" for cell in one[1])]
    table = new_table(title, [heading for heading, _, _ in columns])
    for cells in zip(*(own for _, own, _ in columns), strict=True):
        add_row(table, cells)
    for key in summary.failed:
        marks = {"bank": key, "RelFrob\nend": "failed"}
        add_row(table, [marks.get(heading, "-") for heading, _, _ in columns], "red")
    if len(banks) > 1:
        table.add_section()
        add_row(table, [total for _, _, total in columns], "bold")
    return table


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _footer(summary: RunSummary, folder: Path, dense: bool) -> list[str]:
    here = Path.cwd()
    folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
    where = folder / "banks" / (summary.banks[0].key if len(summary.banks) == 1 else "<bank>")
    lines = [
        f"family: {sum(bank.kept_parameters for bank in summary.banks):,} of "
        f"{sum(bank.parameters for bank in summary.banks):,} parameters kept; "
        f"model: {summary.total_parameters:,} parameters before",
    ]
    sized = [bank for bank in summary.banks if bank.metrics.get("bytes")]
    if sized:
        held = sum(bank.metrics["bytes"] or 0 for bank in sized)
        lines.append(f"bytes: {held:,.0f} for the family, {summary.bits:.2f} bits a weight")
    memory = []
    for label, name in (("host", "peak_host_bytes"), ("device", "peak_device_bytes")):
        sizes = [getattr(one, name) for one in summary.runtimes.values() if getattr(one, name) is not None]
        if sizes:
            memory.append(f"{label} {max(sizes) / 2**20:,.0f} MiB")
    if memory:
        lines.append(f"peak memory: {', '.join(memory)}; on {summary.device}; {summary.seconds:.1f} s in all")
    lines += _mse_lines(summary)
    for key, reason in summary.failed.items():
        lines.append(f"{key} failed: {reason}")
    lines.append(f"artefact: {where}")
    if summary.banks:
        smaller = "" if dense else ", with format=globe for smaller files"
        lines.append(f"next: python -m globe.patch run={folder} out=FOLDER{smaller}")
    return lines


def _mse_lines(summary: RunSummary) -> list[str]:
    figures = summary.mse()
    if figures["mean"] is None:
        return []
    parts = [f"mean over the banks {figures['mean']:.3e}"]
    for groups in (figures["families"], figures["layers"]):
        if 1 < len(groups) <= _SHOWN_GROUPS:
            parts.append(", ".join(f"{key} {figure:.3e}" for key, figure in groups.items()))
    more = "" if len(figures["layers"]) <= _SHOWN_GROUPS else "; each of them in summary.json"
    return [f"MSE_F: {'; '.join(parts)}{more}"]


def median_support(summary: RunSummary) -> float:
    """Return the median number of atoms that an expert uses, over all banks; NaN for no bank."""
    supports = [size for bank in summary.banks for size in bank.supports]
    return median(supports) if supports else math.nan
