"""The experts of a bank, read from the checkpoint and normalised member by member."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from globe.checkpoint import Checkpoint
from globe.config import Config, ExportDtype
from globe.normalise import Joined, join, normalise
from globe.problem import Outline

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


def read_experts(config: Config, checkpoint: Checkpoint, bank: Outline, device: torch.device) -> ReadExperts:
    """The experts of all members, each member normalised by itself.

    Raises CheckpointError when they can't be read or are not finite.
    """
    model, options = config.model, config.normalise
    before, parts, seconds = checkpoint.reader.bytes_read, [], 0.0
    dtype = torch.float32
    for member in bank.members:
        clock = time.perf_counter()
        experts = checkpoint.read_experts(
            member.layer,
            member.family,
            include_shared=model.include_shared,
            max_experts=model.max_experts,
            sample_method=str(model.sample_method),
        )
        seconds += time.perf_counter() - clock
        dtype = experts.weights.dtype
        parts.append(
            normalise(
                experts.weights.to(device),
                centre=str(options.centre),
                scale=str(options.scale),
                dtype=DTYPES[config.dtype],
            )
        )
        del experts  # in the checkpoint's dtype; only the normalised ones are needed from here on
    if config.export_dtype is not ExportDtype.auto:
        dtype = DTYPES[config.export_dtype]
    return ReadExperts(join(parts), dtype, checkpoint.reader.bytes_read - before, seconds)
