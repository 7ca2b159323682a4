"""Rounding of the weights themselves: to the nearest level, with error feedback, and the latter after rotations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.bank.feedback import round_with_feedback
from globe.bank.packing import Packed
from globe.bank.rotation import rotation
from globe.bank.rounding import Grid, LevelGrid, round_nearest
from globe.numerics.chunks import expert_chunks

Moments = Callable[[slice], Float[Tensor, "c d d"]]
"""Second moments C_i of the inputs of some experts; errors count as tr(E_i C_i E_i^T)."""


class RoundedWeights(NamedTuple):
    """W_i ~ packed_i basis."""

    packed: Packed
    basis: Float[Tensor, "d d"]
    """the identity, or an orthogonal matrix of exact entries that a seed gives"""


def round_weights(
    W: Float[Tensor, "n p d"],
    grid: Grid | LevelGrid,
    *,
    moments: Moments | None = None,
    coupled: Moments | None = None,
    seed: int | None = None,
    whole_rows: bool = False,
) -> RoundedWeights:
    """Round every row of W_i to the bits of `grid`, with one searched scale for each of its groups of columns.

    moments   error feedback in the metric C_i of each expert (GPTQ, arXiv 2210.17323); None rounds to the nearest level
    coupled   second moments of what the rows stand for, where these are inputs, as those of down are
    seed      rounds R W_i S^T in the place of W_i, with the rotations R and S of this seed and the next, and the metric
              S C_i S^T (incoherence: QuIP, arXiv 2307.13304, section 4)
    whole_rows rotates the columns alone, R = I, so that rows of different bits stay what they are
    """
    n, p, d = W.shape
    rows = None if seed is None or whole_rows else rotation(p, seed).to(W)
    basis = torch.eye(d, dtype=W.dtype, device=W.device) if seed is None else rotation(d, seed + 1).to(W)
    parts = []
    for part in expert_chunks(n, max(p, d), d):
        here, own = grid.of_rows(part), W[part]
        if seed is not None:
            own = own @ basis.T if rows is None else rows @ own @ basis.T
        if moments is None:
            rounded = round_nearest(own, here)
        else:
            C, R = moments(part), None if coupled is None else coupled(part)
            if seed is not None:
                C = basis @ C @ basis.T
            if rows is not None:
                R = None if R is None else rows @ R @ rows.T
            rounded = round_with_feedback(own, C, here, rows=R)
        parts.append(Packed.of(rounded, turned=None if rows is None else seed))
    return RoundedWeights(Packed.joined(parts), basis)
