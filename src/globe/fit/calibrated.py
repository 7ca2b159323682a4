"""The statistics that a run's metric is made of, where `normalise.metric` asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from globe.calibration.run import Calibration, calibrate
from globe.checkpoint import Checkpoint
from globe.checkpoint.in_memory import ExpertsInMemory
from globe.config.choices import Metric
from globe.config.schema import Config, chosen_metric
from globe.errors import ConfigError
from globe.fit.observed import Observed
from globe.fit.plan import Outline
from globe.fit.provenance import experts_of


def calibration_for(
    config: Config, checkpoint: Checkpoint, banks: Sequence[Outline], device: torch.device
) -> Calibration | None:
    """Return the statistics of the layers of some banks, taken now where they are not on disk; None without a need.

    Raises ConfigError for a text that can't be used or experts without a model, CheckpointError for a model that can't
    be run layer by layer, ArtefactError when the disk refuses.
    """
    if chosen_metric(config) is not Metric.inputs:
        return None
    if isinstance(checkpoint, ExpertsInMemory):
        raise ConfigError(
            "normalise.metric=inputs runs a model on calibrate.text, which needs its folder or hub id: give that, or "
            "normalise.metric=experts"
        )
    layers = sorted({member.layer for bank in banks for member in bank.members})
    return calibrate(checkpoint, config.calibrate, output=config.output, layers=layers, device=device)


def observed_members(
    config: Config, checkpoint: Checkpoint, bank: Outline, calibration: Calibration | None
) -> tuple[Observed, ...]:
    """Return what the members of a bank did on the calibration text, in the order of their rows; none without one."""
    if calibration is None or chosen_metric(config) is not Metric.inputs:
        return ()
    layers = {member.layer: calibration.layer(member.layer) for member in bank.members}
    return tuple(
        Observed(layers[member.layer], member.family, experts_of(config, checkpoint, member))
        for member in bank.members
    )
