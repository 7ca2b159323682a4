"""The files of one run as a report reads them: bounded, never resolved, and what is wrong with them in a sentence.

A folder may come from anywhere, so nothing that its files say is looked up in this machine's environment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from globe.config.identity import numerics
from globe.config.plain_yaml import read_yaml
from globe.errors import printable
from globe.files import read_record
from globe.runs.chart_data import BankCharts
from globe.runs.metric_lines import metric_lines
from globe.runs.summary import BankReport, RunSummary

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


def read_options(file: Path) -> dict[str, Any]:
    """Return the options that change numbers, flat (`bank.m`); nothing for a file that can't be read.

    `${...}` stays what it is.
    """
    try:
        config = read_yaml(file)
        plain = {str(key): value for key, value in config.items() if key != "S_cache"}
        with suppress(KeyError, TypeError, AttributeError):  # the options of another version
            plain = numerics(plain)
        return dict(_flat(plain))
    except (OSError, ValueError, RecursionError):
        return {}


def _flat(config: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}{printable(str(key))}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, _printable_value(value)


def _printable_value(value: Any) -> Any:
    """Return the value, with all texts in it printable and everything else plain."""
    if isinstance(value, list):
        return [_printable_value(one) for one in value]
    return value if isinstance(value, bool | int | float | None) else printable(str(value))


def read_traces(file: Path) -> dict[str, Trace]:
    """Return the curves of every bank by its key; a line that was cut by a kill is passed over."""
    names = [one.name for one in fields(Trace)]
    columns: dict[str, dict[str, list[float | None]]] = {}
    with suppress(OSError, ValueError):
        for record in filter(None, metric_lines(file)):
            own = columns.setdefault(printable(str(record["bank"])), {name: [] for name in names})
            for name in names:
                own[name].append(_number(record.get(name)))
    return {bank: Trace(**{name: tuple(own[name]) for name in names}) for bank, own in columns.items()}


def read_quality(file: Path) -> Quality | None:
    """Return the result of `globe.evaluate` in a run's folder; None if there is none, or none of this version."""
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
            text=printable(text),
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def _rise(record: dict[str, Any] | None) -> tuple[float, float | None, float | None] | None:
    """Return the rise over another model on the same windows, whose interval is far narrower than that of either."""
    if record is None or (ratio := _number(record["ratio"])) is None:
        return None
    low, high = record["ratio_interval"] or (None, None)
    ends = (_number(low), _number(high))
    return (ratio - 1, *(None if end is None else end - 1 for end in ends))  # type: ignore[return-value]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of a thousand digits
        return None


def fault_of(summary: RunSummary) -> str | None:
    """Return what of a summary can't be what a run wrote, or None; a picture would stumble over it.

    Its types were checked when it was read.
    """
    if summary.total_parameters < 1:
        return "total_parameters is no count"
    return next((fault for bank in summary.banks if (fault := _fault_of_bank(bank))), None)


def _fault_of_bank(bank: BankReport) -> str | None:
    if not (bank.key.isprintable() and bank.method.isprintable()):
        return "the key or the method of a bank is no printable text"
    sizes = (bank.n, bank.m, bank.r, bank.parameters)
    if min(sizes) < 1 or bank.kept_parameters < 0 or max(*sizes, bank.kept_parameters) >= 2**63:
        return f"a size of {bank.key} is no count"
    if len(bank.atom_usage) != bank.m or len(bank.expert_relfrob) != bank.n or not bank.supports:
        return f"the lists of {bank.key} have not the lengths of its sizes"
    return None if bank.charts is None else _fault_of_charts(bank, bank.charts)


def _fault_of_charts(bank: BankReport, charts: BankCharts) -> str | None:
    shape = [len(charts.code_atoms)] * len(charts.code_experts)
    inside = all(0 <= one < bank.n for one in charts.code_experts)
    inside = inside and all(0 <= one < bank.m for one in charts.code_atoms)
    spectra = (charts.spectrum_ranks, charts.spectrum_original, charts.spectrum_rebuilt)
    whole = [len(row) for row in charts.code_shares] == shape and len({len(one) for one in spectra}) == 1
    drawable = inside and whole and shape and charts.spectrum_ranks and charts.code_atoms
    return None if drawable else f"charts of {bank.key} is not what a run writes"
