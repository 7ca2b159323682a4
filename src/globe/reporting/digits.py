"""Every digit of every bank, for `runs.csv`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from globe.reporting.front import fronts
from globe.reporting.runs import ReportRun
from globe.runs.summary import BankReport

_BANK_FIELDS = (
    "method", "n", "p", "d", "m", "r", "atom_rank", "target_support", "parameters", "kept_parameters", "kept",
    "relfrob_start", "relfrob_fit", "relfrob", "steps", "accepted", "rejected", "export_dtype", "stop", "seed",
)  # fmt: skip
_RUNTIME_FIELDS = ("seconds", "seconds_total", "steps_per_second", "peak_host_bytes", "peak_device_bytes")
_QUALITY_FIELDS = {
    "perplexity": "perplexity", "perplexity_low": "low", "perplexity_high": "high", "perplexity_original": "original",
    "kl": "kl",
}  # fmt: skip


def digits(runs: Sequence[ReportRun], varied: Sequence[str]) -> list[dict[str, Any]]:
    """Return one record per run and bank with every digit, for `runs.csv`; a run without a bank has one record."""
    front = {run.number for members in fronts(runs).values() for run in members}
    return [
        _record(run, bank, varied) | {"run_on_front": run.number in front}
        for run in runs
        for bank in (run.summary.banks if run.summary is not None and run.measured else (None,))
    ]


def _record(run: ReportRun, bank: BankReport | None, varied: Sequence[str]) -> dict[str, Any]:
    summary, quality = run.summary, run.quality
    record: dict[str, Any] = {"number": run.number, "run": run.name, "state": run.state, "error": run.error}
    record |= {"S_cache": ", ".join(run.caches)}
    record |= {f"option.{name}": run.options.get(name) for name in varied}
    record |= {"bank": None if bank is None else bank.key}
    record |= {name: None if bank is None else getattr(bank, name) for name in _BANK_FIELDS}
    record["support_median"] = None if bank is None else median(bank.supports)
    record["effective_rank"] = None if bank is None else bank.metrics.get("effective_rank_mean")
    runtime = None if summary is None or bank is None else summary.runtimes.get(bank.key)
    record |= {name: None if runtime is None else getattr(runtime, name) for name in _RUNTIME_FIELDS}
    done = summary if run.measured else None
    record["run_relfrob"] = None if done is None else done.relfrob
    record["run_kept"] = None if done is None else done.kept
    record["run_bits"] = None if done is None else done.bits
    record["run_kept_model"] = None if done is None else done.kept_model()
    for at, name in enumerate(("perplexity_rise", "perplexity_rise_low", "perplexity_rise_high")):
        record[name] = None if quality is None or quality.rise is None else quality.rise[at]
    record |= {
        key: None if quality is None else getattr(quality, name) for key, name in _QUALITY_FIELDS.items()
    }
    return record
