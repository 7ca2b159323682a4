"""What a calibration takes, from headers alone: the form of its second moments, memory and disk."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from globe.calibration.collect import BUFFERED
from globe.checkpoint import Checkpoint
from globe.config.calibrate_options import CalibrateConfig
from globe.errors import ConfigError

WHOLE = 16e9
"""Bytes up to which the second moments of a layer are kept whole where no limit is given."""
LEAST_RANK = 8
GRADIENT_PART = 4
"""The part of a batch that gradients go through a layer with, since they need all that is computed on the way."""
_GB = 1e9


@dataclass(frozen=True, slots=True)
class LayerSize:
    """The largest n, p and d of the layers."""

    n: int
    p: int
    d: int

    def sums(self, rank: int | None) -> int:
        """Return the bytes of the sums of a layer while they grow, and of the copy in which they are written."""
        n, both = self.n, self.p + self.d
        rows = n * max(BUFFERED, rank or 0) * both * 4
        if rank is None:
            return rows + n * (self.p**2 + self.d**2) * 8 + n * max(self.p, self.d) ** 2 * 4
        return rows + n * both * (2 * rank * 4 + 8) + 6 * (rank + max(BUFFERED, rank)) * both * 8

    def stored(self, rank: int | None) -> int:
        """Return the bytes of a layer's file."""
        if rank is None:
            return self.n * (self.p**2 + self.d**2 + 2 * self.p) * 4
        return self.n * (self.p + self.d) * (rank + 3) * 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What is told before the time is spent."""

    rank: int | None
    """of the second moments; None keeps them whole"""
    memory: int
    """bytes, about"""
    disk: int
    """bytes of the files that stay and of the hidden states in between"""
    gradient_tokens: int = 0
    """tokens on which gradients are taken"""

    @property
    def sentence(self) -> str:
        form = "whole" if self.rank is None else f"of rank {self.rank} plus a diagonal"
        return (
            f"calibration takes about {_size(self.memory)} of memory and {_size(self.disk)} of disk, with "
            f"second moments {form}"
            + (f" and gradients on {self.gradient_tokens:,} tokens" if self.gradient_tokens else "")
        )


def _size(count: int) -> str:
    return f"{count / _GB:.2f} GB" if count >= _GB else f"{max(1, round(count / 1e6))} MB"


def plan_calibration(
    checkpoint: Checkpoint,
    options: CalibrateConfig,
    *,
    tokens: int,
    gradient_tokens: int = 0,
    dtype: torch.dtype,
) -> Plan:
    """Return the form that fits into `calibrate.memory`. Raises ConfigError if none does."""
    shapes = [checkpoint.shape(layer, "up") for layer in checkpoint.moe_layers]
    size = LayerSize(*(max(getattr(one, axis) for one in shapes) for axis in ("n", "p", "d")))
    model = _resident(checkpoint, dtype) + _working(size, options)
    room = WHOLE if options.memory is None else options.memory * _GB - model
    rank = _rank(size, room)
    if rank is not None and rank < LEAST_RANK:
        least = (model + size.sums(LEAST_RANK)) / _GB
        raise ConfigError(
            f"calibrate.memory={options.memory} is too little for a layer of {checkpoint.folder}: give at least "
            f"{least + 0.01:.2f}"
        )
    state = size.d * dtype.itemsize
    disk = len(shapes) * size.stored(rank) + 2 * tokens * state
    if not gradient_tokens:
        return Plan(rank, int(model + size.sums(rank)), disk)
    back = model + 20.0 * size.d**2 + 16.0 * options.window * _vocabulary(checkpoint)
    if options.memory is not None and back > options.memory * _GB:
        raise ConfigError(
            f"calibrate.memory={options.memory} is too little for gradients: give at least {back / _GB + 0.01:.2f}, or "
            "calibrate.gradient_tokens=0, which takes none"
        )
    disk += len(shapes) * size.d * (size.d + size.n) * 4
    states = (checkpoint.num_layers + 2) * gradient_tokens * state
    return Plan(rank, int(max(back, model + size.sums(rank))), disk + states, gradient_tokens)


def _vocabulary(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config.get("text_config", checkpoint.config).get("vocab_size") or 0)


def _rank(size: LayerSize, room: float) -> int | None:
    """Return the largest rank whose sums fit, None if whole matrices do."""
    if size.sums(None) <= room:
        return None
    low, high = 0, max(size.p, size.d)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size.sums(middle) <= room else (low, middle - 1)
    return low


def _resident(checkpoint: Checkpoint, dtype: torch.dtype) -> float:
    """Return the bytes of the largest decoder layer, as stored and converted, and of all that is in no layer."""
    layers: dict[str, float] = {}
    for name in checkpoint.reader.names:
        found = re.search(r"(?<![^.])layers\.(\d+)(?![^.])", name)
        entry = checkpoint.reader.entry(name)
        numbers = entry.nbytes // entry.dtype.itemsize
        key = found[1] if found else ""
        stored = entry.nbytes if found else 0
        layers[key] = layers.get(key, 0) + numbers * dtype.itemsize + stored
    return layers.pop("", 0) + max(layers.values(), default=0)


def _working(size: LayerSize, options: CalibrateConfig) -> float:
    """Return the bytes of what a batch leaves in memory on its way through a layer."""
    tokens = options.batch * options.window
    return tokens * 4.0 * (16 * size.d + 12 * size.p + 4 * options.window)
