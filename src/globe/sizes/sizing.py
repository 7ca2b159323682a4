"""What every choice of sizes reads experts with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from globe.calibration.run import Calibration
from globe.checkpoint import Checkpoint
from globe.config.schema import Config
from globe.fit.input_metric import metric_of
from globe.fit.normalise import Joined
from globe.fit.plan import Outline
from globe.fit.reading import read_experts
from globe.numerics.input_metric import InputMetric
from globe.runs.allocation import Allocation


@dataclass(frozen=True, slots=True)
class Sizing:
    """Where the experts of a run come from, and who looks on."""

    checkpoint: Checkpoint
    device: torch.device
    calibration: Calibration | None = None
    quiet: bool = False
    """print no table"""
    on_allocation: Callable[[Allocation], None] = lambda found: None
    """is called with the shares of `budget.over=model` once they are chosen, before any fit"""

    def read(self, config: Config, bank: Outline) -> tuple[Joined, InputMetric | None]:
        """Return the experts of a bank, and the metric that errors count in. Raises CheckpointError."""
        read = read_experts(config, self.checkpoint, bank, self.device, calibration=self.calibration)
        return read.joined, metric_of(config, read)
