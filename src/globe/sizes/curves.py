"""What a bank loses at each size, told in advance: the error of one shared basis, weighted by what the model feels.

The shared basis (m = 1) has a closed form for every size at once: with G = sum_i X_i^T X_i, in the metric of the fit,
the best basis of r rows leaves the energy of all but the r largest eigenvalues of G. A fit is better at every size and
falls with it alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from globe.fit.normalise import Joined, denormalise
from globe.numerics.chunks import expert_chunks
from globe.numerics.input_metric import InputMetric
from globe.numerics.precision import to_float64

LEVELS = tuple(level / 20 for level in range(2, 20))
"""Shares of its numbers that a bank may keep, besides the run's own share and all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """G of one bank: its eigenvectors, and the share of the energy that bases of 0, 1, .. d rows leave."""

    n: int
    p: int
    vectors: Float[Tensor, "d d"]
    """columns, the largest eigenvalue first"""
    left: tuple[float, ...]

    def rows(self, limit: int) -> int:
        """Return the rows of the largest shared basis that keeps at most `limit` numbers: n p r + r d + n."""
        d = len(self.vectors)
        return max(0, min(d, self.n * self.p, (limit - self.n) // (self.n * self.p + d)))

    def error(self, limit: int) -> float:
        """Return the share of the energy that the basis of that size leaves, 0 to 1."""
        return self.left[self.rows(limit)]


def spectrum(X: Float[Tensor, "n p d"], metric: InputMetric | None) -> Spectrum:
    """Return the eigenvalues of G for normalised experts, in the metric, summed in float64 where the device has it."""
    n, p, d = X.shape
    gram = to_float64(X.new_zeros(d, d))
    for part in expert_chunks(n, p, d):
        own = X[part] if metric is None else metric.seen(X[part], part)
        flat = to_float64(own.flatten(0, 1))
        gram += flat.T @ flat
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0).flip(0)
    total = float(values.sum())
    left = values.flip(0).cumsum(0).flip(0).tolist() if total > 0 else [0.0] * d
    return Spectrum(n, p, vectors.flip(1).to(X), (*(one / (total or 1.0) for one in left), 0.0))


def approximated(
    joined: Joined, metric: InputMetric | None, basis: Spectrum, limit: int
) -> Float[Tensor, "n p d"]:
    """Return the experts as a shared basis of at most `limit` numbers gives them back, in their own units."""
    V = basis.vectors[:, : basis.rows(limit)]
    X = joined.experts
    rebuilt = torch.empty_like(X[0:1]).expand(0, -1, -1).new_empty(X.shape)
    for part in expert_chunks(*X.shape):
        own = X[part] if metric is None else metric.seen(X[part], part)
        rebuilt[part] = (own @ V) @ V.T
    if metric is not None:
        metric.leave(rebuilt)
    mean = joined.mean
    if mean is not None:
        mean = mean[0]  # of the only member
    return denormalise(rebuilt, mean, joined.scale)


def limits(parameters: int, share: float) -> tuple[int, ...]:
    """Return the numbers that a bank may keep: those of `LEVELS` and of `share`, rounded down, and all of them."""
    levels: Sequence[float] = sorted({*LEVELS, share} - {1.0})
    return (*(int(level * parameters) for level in levels), parameters)
