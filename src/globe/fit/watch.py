"""What happens beside the steps of a fit: progress, checkpoints and times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from globe.am.records import FitResult, FitState, StepRecord
from globe.fit.reading import ReadExperts
from globe.fit.unfinished_fit import Fitting, write_state
from globe.numerics.device import peak_device_bytes, peak_host_bytes
from globe.runs.summary import BankRuntime


class Watch:
    """Follow one fit: pass its steps on, write its checkpoints, add up its times."""

    def __init__(
        self,
        key: str,
        fitting: Fitting,
        partial: Path | None,
        on_step: Callable[[str, StepRecord], None],
    ) -> None:
        """Watch a fit; `partial` is the folder of the fit's checkpoints; None in a process that writes none."""
        self.key, self.fitting, self.partial, self.on_step = key, fitting, partial, on_step
        self.last: StepRecord | None = None
        self.phases = {"coding": 0.0, "dictionary": 0.0, "refit": 0.0}

    def step(self, record: StepRecord) -> None:
        self.last = record
        for phase in self.phases:
            self.phases[phase] += getattr(record, f"seconds_{phase}")
        self.on_step(self.key, record)

    def checkpoint(self, state: FitState) -> None:
        if self.partial is None:
            return
        step = self.fitting.step if self.last is None else self.last.step
        fitting = Fitting(self.fitting.fingerprint, self.fitting.attempt, step)
        write_state(self.partial, state, fitting)

    def runtime(
        self, result: FitResult, *, seconds: float, experts: int, read: ReadExperts, device: torch.device
    ) -> BankRuntime:
        """Return the times: phases of this process; `result.seconds` counts what came before a resumption too."""
        return BankRuntime(
            seconds=result.seconds,
            seconds_total=seconds,
            seconds_coding=self.phases["coding"],
            seconds_dictionary=self.phases["dictionary"],
            seconds_refit=self.phases["refit"],
            steps_per_second=result.steps / max(result.seconds, 1e-9),
            experts_per_second=experts / max(seconds, 1e-9),
            read_bytes_per_second=read.bytes / max(read.seconds, 1e-9),
            peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=peak_device_bytes(device),
        )
