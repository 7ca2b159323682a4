"""The experts of a bank, read from the checkpoint and normalised member by member."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from globe.calibration.run import Calibration
from globe.checkpoint import Checkpoint
from globe.config.choices import ExportDtype, Store
from globe.config.schema import Config
from globe.fit.calibrated import observed_members
from globe.fit.normalise import Joined, join, normalise
from globe.fit.observed import Observed
from globe.fit.plan import Outline
from globe.numerics.group import ALONE, ProcessGroup

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class ReadExperts(NamedTuple):
    joined: Joined
    export_dtype: torch.dtype
    """what `export_dtype` says, or the checkpoint's own"""
    bytes: int
    seconds: float
    """of reading alone"""
    observed: tuple[Observed, ...] = ()
    """what the experts of each member did on the calibration text, where the metric asks for it"""


def read_experts(
    config: Config,
    checkpoint: Checkpoint,
    bank: Outline,
    device: torch.device,
    group: ProcessGroup = ALONE,
    *,
    calibration: Calibration | None = None,
) -> ReadExperts:
    """Return the experts of all members that this process holds, each member normalised by itself (over all processes).

    Raises CheckpointError when they can't be read or are not finite.
    """
    model, options = config.model, config.normalise
    before, parts, seconds = checkpoint.bytes_read, [], 0.0
    dtype, start = torch.float32, 0
    for member, count in zip(bank.members, bank.counts, strict=True):
        part = group.within(start, start + count)
        start += count
        clock = time.perf_counter()
        experts = checkpoint.read_experts(
            member.layer,
            member.family,
            include_shared=model.include_shared,
            max_experts=model.max_experts,
            sample_method=str(model.sample_method),
            rows=part.rows,
        )
        seconds += time.perf_counter() - clock
        dtype = experts.weights.dtype
        parts.append(
            normalise(
                experts.weights.to(device),
                centre=str(options.centre),
                scale=str(options.scale),
                dtype=DTYPES[config.dtype],
                group=part,
                store=options.store is Store.checkpoint,
            )
        )
        del experts  # in the checkpoint's dtype; the normalised ones are all that is needed from here on
    if config.export_dtype is not ExportDtype.auto:
        dtype = DTYPES[config.export_dtype]
    read = checkpoint.bytes_read - before
    observed = observed_members(config, checkpoint, bank, calibration)
    return ReadExperts(join(parts), dtype, read, seconds, observed)
