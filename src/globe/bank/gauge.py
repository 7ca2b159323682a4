"""What rounding wants of factors that stand for the same products: where the bits go, and in which gauge.

With W_i = A_i M_i, dividing column k of every A_i by s_k and multiplying row k of every M_i by it changes nothing, and
where phi is linear neither does (A_i T^-1)(T M_i) for any invertible T, since T goes into the atoms.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from globe.bank.rounding import MOST_BITS, NOISE, SCALE_DTYPE, STEP, LevelGrid

_LEVELS = 16
"""At most: of importances further apart than 2^16 the lower ones count as that."""
_SMALLEST = 1e-12
"""Directions below this share of the mean count as this much: they get no bits whatever the gauge."""


def allocate_bits(importance: Sequence[float], total: int, *, most: int = MOST_BITS) -> tuple[int, ...]:
    """Share out `total` bits over columns so that sum_k importance_k NOISE[bits_k] is as small as it can be.

    importance   what column k costs if it is left out: the mean squares of A's column and of M's row, multiplied
    This is reverse water-filling (Cover and Thomas, Elements of Information Theory, theorem 13.3.3) in whole bits; the
    greedy choice is exact, since each further bit of a column gains less than the one before. Columns get 0 to `most`
    bits; what is more than all columns can take is left.
    """
    bits = [0] * len(importance)
    queue = [(-value * (NOISE[0] - NOISE[1]), k) for k, value in enumerate(importance)]
    heapq.heapify(queue)
    while total > 0 and queue:
        _, k = heapq.heappop(queue)
        bits[k] += 1
        total -= 1
        if bits[k] < most:
            heapq.heappush(queue, (-importance[k] * (NOISE[bits[k]] - NOISE[bits[k] + 1]), k))
    return tuple(bits)


def share_bits(rows: Float[Tensor, "*rows"], columns: Float[Tensor, " k"], total: int) -> LevelGrid | None:
    """Share out `total` bits over entries that cost rows x columns if they are left out; None if they are
    too few.

    The same reverse water-filling, where rows differ as much as columns do: an expert that is used a hundred times as
    often, or a row that the output depends on, gets more bits. Rows are sorted into levels, each twice as important as
    the one below and at most 16 from the most important one down; rows of a level have equal bits, in whole bytes. The
    bits of a level are those whose gain is above one bound for all, which is as low as the total allows.
    """
    most = float(rows.max())
    if not most > 0:
        rows, most = torch.ones_like(rows), 1.0
    steps = (rows / most).clamp_min(2.0**-_LEVELS).log2().round().clamp_min(1 - _LEVELS)
    kept, levels = steps.unique(return_inverse=True)  # the least important one first
    counts = torch.bincount(levels.flatten()).tolist()
    shares = [most * 2.0**step for step in kept.tolist()]
    gain = torch.tensor([NOISE[b] - NOISE[b + 1] for b in range(MOST_BITS)], dtype=torch.float64)
    gains = columns.double().cpu()[:, None] * gain  # of each further bit of a column

    def widths(bound: float) -> list[int]:
        return [8 * round(int((gains * share > bound).sum()) / 8) for share in shares]

    def fits(bound: float) -> bool:
        return sum(count * width for count, width in zip(counts, widths(bound), strict=True)) <= total

    low, high = 0.0, float(gains.max()) * most
    if not high > 0 or not fits(high):
        return None
    for _ in range(60):
        middle = (low + high) / 2 if low == 0 else (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    chosen = widths(high)
    # what is left over, to the most important rows that it is enough for
    for at in reversed(range(len(chosen))):
        used = sum(count * width for count, width in zip(counts, chosen, strict=True))
        chosen[at] += 8 * (used + 8 * counts[at] <= total and chosen[at] < MOST_BITS * len(columns))
    tables = tuple(allocate_bits(columns.tolist(), width) for width in chosen)
    return LevelGrid(tables, levels.to(torch.uint8))


def column_factors(
    squares: Float[Tensor, " k"], weights: Float[Tensor, " k"], bits: Sequence[int]
) -> Float[Tensor, " k"]:
    """Return what to divide the columns of A by before they are rounded with one scale a group, as numbers of bfloat16.

    squares   mean squares of A's columns
    weights   mean squares of M's rows, in the metric
    Two rules are weighed equally, geometrically: columns as large as the reach of their bits (sqrt(squares) times the
    best step of so many bits), and errors that weigh alike (1 / sqrt(weights)). Where the bits are shared out by
    `allocate_bits` the two nearly agree. Only ratios matter; columns of zeros keep 1.
    """
    step = torch.tensor([STEP[b] for b in bits], dtype=squares.dtype, device=squares.device)
    reach, alike = squares.clamp_min(0).sqrt() * step, weights.clamp_min(0).sqrt()
    good = (reach > 0) & (alike > 0)
    factors = torch.where(
        good, (reach / torch.where(good, alike, torch.ones_like(alike))).sqrt(), torch.ones_like(reach)
    )
    if bool(good.any()):
        factors = torch.where(good, factors / factors[good].log().mean().exp(), factors)
    return factors.to(SCALE_DTYPE).to(squares)


def balanced_gauge(K: Float[Tensor, "r r"], G: Float[Tensor, "r r"]) -> tuple[Tensor, Tensor]:
    """Return T and its inverse with T K T^T = T^-T G T^-1, diagonal and falling: K = sum M_i M_i^T, G = sum A_i^T A_i.

    Columns of A and rows of M are then uncorrelated on the whole and balanced, so that bits can be shared out column by
    column (balanced realisations: Moore 1981, section III). In float64, but for the result.
    """
    wide, other = K.double().cpu(), G.double().cpu()
    eye = torch.eye(len(wide), dtype=torch.float64)
    for one in (wide, other):
        one += _SMALLEST * max(float(one.diagonal().mean()), 1e-300) * eye
    lower = torch.linalg.cholesky(wide)
    values, vectors = torch.linalg.eigh(lower.mT @ other @ lower)
    values, vectors = values.flip(0).clamp_min(1e-300), vectors.flip(1)
    root = values**0.25
    T = root[:, None] * torch.linalg.solve_triangular(lower, vectors.mT, upper=False, left=False)
    inverse = lower @ vectors / root
    return T.to(K), inverse.to(K)
