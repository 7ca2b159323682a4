"""What a calibration takes, from headers alone: the form of its second moments, memory and disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from globe.calibration.collect import buffered_rows, rank_of
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

    def growing(self, rank: int | None) -> int:
        """Return the bytes of the sums of a layer while they grow, with rows that gather and the work space."""
        total = work = 0
        for q in (self.p, self.d):
            k = rank_of(rank, q)
            rows = buffered_rows(k)
            both = rows + (k or 0)
            total += self._sums(q, k) + self.n * rows * q * 4
            # a product; or the vectors and their squares, beside matrix, eigenvectors and work space in float64
            work = max(work, 4 * q**2 if k is None else 16 * both * q + 32 * both**2)
        return total + work

    def finishing(self, rank: int | None) -> int:
        """Return the bytes of the sums of a layer while the means are taken, those of the inputs first."""
        p, d = ((q, rank_of(rank, q)) for q in (self.p, self.d))
        return self._sums(*p) + self._means(*d) + max(self._sums(*d), self._means(*p))

    def stored(self, rank: int | None) -> int:
        """Return the bytes of a layer's file."""
        return self.n * 8 * self.p + sum(self._means(q, rank_of(rank, q)) for q in (self.p, self.d))

    def _sums(self, q: int, k: int | None) -> int:
        return self.n * q * (8 * q if k is None else 4 * k + 8)

    def _means(self, q: int, k: int | None) -> int:
        return self.n * q * 4 * (q if k is None else k + 1)


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
    rest, layer, loading = _weights(checkpoint, dtype)
    working = _working(size, options)

    def taken(rank: int | None) -> float:
        sums = max(working + size.growing(rank), size.finishing(rank))
        return rest + max(loading, layer + sums)

    limit = None if options.memory is None else options.memory * _GB
    rank = _rank(size, lambda rank: size.growing(rank) <= WHOLE if limit is None else taken(rank) <= limit)
    if rank is not None and rank < LEAST_RANK:
        least = taken(LEAST_RANK) / _GB
        raise ConfigError(
            f"calibrate.memory={options.memory} is too little for a layer of {checkpoint.folder}: give at least "
            f"{least + 0.01:.2f}"
        )
    state = size.d * dtype.itemsize
    disk = len(shapes) * size.stored(rank) + 2 * tokens * state
    if not gradient_tokens:
        return Plan(rank, int(taken(rank)), disk)
    back = rest + max(layer + working + 20.0 * size.d**2, 20.0 * options.window * _vocabulary(checkpoint))
    if limit is not None and back > limit:
        raise ConfigError(
            f"calibrate.memory={options.memory} is too little for gradients: give at least {back / _GB + 0.01:.2f}, or "
            "calibrate.gradient_tokens=0, which takes none"
        )
    disk += len(shapes) * size.d * (size.d + size.n) * 4
    states = (checkpoint.num_layers + 2) * gradient_tokens * state
    return Plan(rank, int(max(back, taken(rank))), disk + states, gradient_tokens)


def _vocabulary(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config.get("text_config", checkpoint.config).get("vocab_size") or 0)


def _rank(size: LayerSize, fits: Callable[[int | None], bool]) -> int | None:
    """Return the largest rank that fits, None if whole matrices do."""
    if fits(None):
        return None
    low, high = 0, (max(size.p, size.d) - 1) // 2
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _weights(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return the bytes of all that is in no decoder layer, of the largest layer, and of that while it is loaded.

    The matrices of the experts come one by one, are stacked for each family, and gate and up, two thirds of all, are
    then joined: with what is stored, 1 + 2/3 + 2/3 of the layer at once.
    """
    held: dict[str, float] = {}
    loading: dict[str, float] = {}
    for name in checkpoint.reader.names:
        found = re.search(r"(?<![^.])layers\.(\d+)(?![^.])", name)
        entry = checkpoint.reader.entry(name)
        converted = entry.nbytes // entry.dtype.itemsize * dtype.itemsize
        key = found[1] if found else ""
        held[key] = held.get(key, 0) + converted
        loading[key] = loading.get(key, 0) + entry.nbytes + converted * 7 / 3
    rest = held.pop("", 0.0)
    loading.pop("", None)
    return rest, max(held.values(), default=0.0), max(loading.values(), default=0.0)


def _working(size: LayerSize, options: CalibrateConfig) -> float:
    """Return the bytes of what a batch leaves in memory on its way through a layer."""
    tokens = options.batch * options.window
    return tokens * 4.0 * (16 * size.d + 12 * size.p + 4 * options.window)
