"""What a run has learned so far: after every bank, `summary.json` and the bank's state are on disk."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from globe.am.records import StopReason
from globe.fit.figures import jaccard_figures
from globe.fit.one_bank import Learned
from globe.fit.plan import BankPlan, cache_bytes
from globe.fit.reading import DTYPES
from globe.runs.folder import BankStatus, RunFolder, State
from globe.runs.summary import RunSummary

_log = logging.getLogger(__name__)


class Ledger:
    """Adds up the banks of a run; `summary` is that of the banks so far."""

    def __init__(self, folder: RunFolder, **of_run: Any) -> None:
        """Begin with no bank; `of_run` are the fields of `RunSummary` that are known before the first bank."""
        self.folder = folder
        self.summary = RunSummary(**of_run)
        self._clock = time.perf_counter()
        self._codes: dict[tuple[int, str], Float[Tensor, "n m"]] = {}

    def add(self, bank: BankPlan, learned: Learned) -> None:
        report = learned.report
        self._codes |= learned.codes
        runtimes = self.summary.runtimes
        if learned.runtime is not None:
            runtimes = runtimes | {bank.key: learned.runtime}
        S_cache, itemsize = self.summary.S_cache, DTYPES[report.export_dtype].itemsize
        cached = {bank.key: cache_bytes(bank, S_cache, itemsize)}
        self._write(
            replace(
                self.summary,
                banks=(*self.summary.banks, report),
                cache_bytes=self.summary.cache_bytes | cached,
                runtimes=runtimes,
                metrics=jaccard_figures(self._codes),
            )
        )
        start, seen = report.relfrob_start, report.metrics.get("relfrob_metric")
        if seen is None:
            error = f"{start:.4f} -> {report.relfrob:.4f}"
        else:  # the start was measured in the metric of the fit, and is compared with the end there
            error = f"{report.relfrob:.4f} ({start:.4f} -> {seen:.4f} in the metric of the fit)"
        what = f"{report.steps} steps" if learned.fitted else "complete already"
        if learned.fitted and report.stop != StopReason.steps.sentence:
            what += f", {report.stop}"
        _log.info("%s: RelFrob %s, %.1f %% kept; %s", bank.key, error, 100 * report.kept, what)

    def fail(self, bank: BankPlan, error: Exception) -> None:
        _log.error("%s failed: %s", bank.key, error)
        known = self.folder.status.banks.get(bank.key) if self.folder.status else None
        status = known or BankStatus(State.failed)
        self.folder.report(bank.key, replace(status, state=State.failed, error=str(error)))
        self._write(replace(self.summary, failed=self.summary.failed | {bank.key: str(error)}))

    def _write(self, summary: RunSummary) -> None:
        self.summary = replace(summary, seconds=time.perf_counter() - self._clock)
        self.folder.write_summary(self.summary.to_dict())
