"""Which steps coded adapters have: errors that all weigh alike, in as many bits as there are."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from globe.bank.entropy import CLASSES, tables
from globe.bank.rounding import FRUGAL, LARGEST, SCALE_DTYPE, StepGrid

_EXPERTS, _ROWS = 128, 15
"""Largest exponent of an expert, and how much more a row may have (`globe.bank.coded`)."""
_SAMPLE = 512
"""Rows that the bits are counted on."""
_ROOM = 0.9
"""Share of the largest integer that a row may need before its errors are fed on."""


def coded_bits(variance: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the bits that a normal number takes whose variance is so many squared steps, once it is rounded as
    `StepGrid.pull` says."""
    drawn = variance / (1 + FRUGAL / 12 / variance.clamp_min(1e-12)).square()
    place = 2 * (drawn.clamp_min(1e-30).log2() + 6)
    low = place.floor().clamp(0, CLASSES - 2)
    bits = torch.from_numpy(_class_bits()).to(variance)
    at = low.long()
    # half a bit for every factor of two beyond the largest class; below the smallest it fades out
    inside = bits[at] + (place - low) * (bits[at + 1] - bits[at])
    return torch.where(place < 0, bits[0] * torch.exp2(place), inside)


@cache
def _class_bits() -> NDArray[np.float64]:
    table = tables()
    bits = np.zeros(CLASSES)
    for z, cut in enumerate(table.cut):
        share = table.frequency[z - 4 * cut] / table.frequency[z - 4 * cut].sum()
        bits[z] = cut - (share * np.log2(share, where=share > 0, out=np.zeros_like(share))).sum()
    return bits


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
    lower = (most / rows.clamp_min(most * 2.0**-_EXPERTS)).log2() if most > 0 else torch.zeros_like(rows)
    exponents = lower.round()
    exponents = exponents.minimum(exponents.amin(dim=1, keepdim=True) + _ROWS)
    alike = weights.clamp_min(float(weights.max()) * 1e-12).rsqrt()
    seen = (A / torch.exp2(exponents / 2)[..., None] / alike).reshape(n * p, k)
    # the largest number has to be within reach, which is more than enough for any other
    low, high = math.log2(max(float(seen.abs().amax()) / (_ROOM * LARGEST), 2.0**-60)), 60.0
    seen = seen[:: max(1, n * p // _SAMPLE)].square()
    row = (seen / seen.mean(dim=0).clamp_min(1e-30)).mean(dim=1, keepdim=True)
    column = (seen / row.clamp_min(1e-30)).mean(dim=0)
    for _ in range(24):
        middle = (low + high) / 2
        bits = float(coded_bits(row * column / 4.0**middle).mean()) * n * p * k
        low, high = (low, middle) if bits <= total else (middle, high)
    columns = (alike * 2.0**high).to(SCALE_DTYPE).to(A)
    return StepGrid(k, exponents.to(torch.uint8)), columns
