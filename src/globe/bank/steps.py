"""Which steps coded adapters have: errors that all weigh alike, in as many bits as there are."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from globe.bank.entropy import CLASSES, ZERO, tables
from globe.bank.rounding import SCALE_DTYPE, StepGrid

_EXPONENTS = 16
_SAMPLE = 512
"""Rows that the bits are counted on."""
_ROOM = 0.9
"""Share of the largest integer that a row may need before its errors are fed on."""


def coded_bits(variance: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the bits that a normal number takes whose variance is so many squared steps."""
    place = 2 * (variance.clamp_min(1e-30).log2() + 6)
    low = place.floor().clamp(0, CLASSES - 2)
    bits = torch.from_numpy(_class_bits()).to(variance)
    at = low.long()
    # half a bit for every factor of two beyond the largest class; below the smallest it fades out
    inside = bits[at] + (place - low) * (bits[at + 1] - bits[at])
    return torch.where(place < 0, bits[0] * torch.exp2(place), inside)


@cache
def _class_bits() -> NDArray[np.float64]:
    table = tables()
    share = table.frequency / table.frequency.sum(axis=1, keepdims=True)
    sizes = np.abs(np.arange(2 * ZERO + 1) - ZERO)
    return (share * table.length[:, sizes]).sum(axis=1)


def choose_steps(
    A: Float[Tensor, "n p k"], rows: Float[Tensor, "n p"], weights: Float[Tensor, " k"], total: float
) -> tuple[StepGrid, Float[Tensor, " k"]]:
    """Return a step for every row and what to divide the columns by, so that the integers take `total` bits.

    rows, weights   an error of A_ik counts rows_i weights_k times its square
    All errors then count alike, which is the best there is (reverse water-filling: Cover and Thomas, Elements of
    Information Theory, theorem 13.3.3): entries below the water are rounded to 0 and take hardly any bits.
    """
    n, p, k = A.shape
    most = float(rows.max())
    lower = (most / rows.clamp_min(most * 2.0**-_EXPONENTS)).log2() if most > 0 else torch.zeros_like(rows)
    exponents = lower.round().clamp(0, _EXPONENTS - 1)
    alike = weights.clamp_min(float(weights.max()) * 1e-12).rsqrt()
    flat, steps = A.reshape(n * p, k), torch.exp2(exponents / 2).reshape(-1)
    some = slice(None, None, max(1, n * p // _SAMPLE))
    sizes = (flat[some] / steps[some, None] / alike).abs()
    # a column that is far larger than the others is rounded more coarsely, not its rows
    least, seen = sizes.amax(dim=0) / (_ROOM * ZERO), sizes.square()
    row = (seen / seen.mean(dim=0).clamp_min(1e-30)).mean(dim=1, keepdim=True)
    column = (seen / row.clamp_min(1e-30)).mean(dim=0)
    low, high = -60.0, 60.0
    for _ in range(24):
        middle = (low + high) / 2
        wide = least.clamp_min(2.0**middle)
        bits = float(coded_bits(row * (column / wide.square())).mean()) * n * p * k
        low, high = (low, middle) if bits <= total else (middle, high)
    columns = (alike * least.clamp_min(2.0**high)).to(SCALE_DTYPE).to(A)
    needed = (A / columns).abs().amax(dim=2) / (_ROOM * ZERO)
    exponents = torch.maximum(exponents, (2 * needed.clamp_min(1e-30).log2()).ceil())
    return StepGrid(k, exponents.clamp(0, _EXPONENTS - 1).to(torch.uint8)), columns
