"""The figures of a run, each a pure function. Errors come from residuals, in float64 and in chunks of
experts.

Symbols: experts X (n, p, d), adapters A (n, p, r), bases M (n, r, d), codes alpha (n, m) >= 0, bank B (m,
r, d). An atom is in an expert's support when its code is above zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.numerics.precision import to_float64

CHUNK = 8
"""Experts whose residual is formed at once: the largest temporary is CHUNK x p x d."""


def squared_norms(X: Float[Tensor, "n p d"]) -> Float[Tensor, " n"]:
    """Return ||X_i||_F^2 per expert, summed in float64 without a copy of all experts."""
    return torch.stack([to_float64(expert).square().sum() for expert in X])


def squared_errors(
    X: Float[Tensor, "n p d"], A: Float[Tensor, "n p r"], M: Float[Tensor, "n r d"], *, chunk: int = CHUNK
) -> Float[Tensor, " n"]:
    """Return ||X_i - A_i M_i||_F^2 per expert, from the residual; products in the dtype of X, sums in float64."""
    parts = []
    for start in range(0, X.shape[0], chunk):
        rows = slice(start, start + chunk)
        residual = torch.baddbmm(X[rows], A[rows].to(X), M[rows].to(X), alpha=-1)
        parts.append(squared_norms(residual))
    return torch.cat(parts)


def relfrob(errors: Float[Tensor, " n"], norms: Float[Tensor, " n"]) -> float:
    """Return RelFrob = sqrt(sum_i ||X_i - Xhat_i||^2 / sum_i ||X_i||^2), of squared errors and squared norms.

    Experts that are all zero give 0 when reproduced and infinity when not.
    """
    error, norm = float(errors.sum()), float(norms.sum())
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / norm)


def mse(errors: Float[Tensor, " n"], entries: int) -> float:
    """Return the mean squared error per entry, sum_i ||X_i - Xhat_i||^2 / (n p d); `entries` is p d."""
    return float(errors.sum()) / (errors.numel() * entries)


class Spread(NamedTuple):
    """Entry sums of each expert, from which means and variances follow."""

    sums: Float[Tensor, " n"]
    squares: Float[Tensor, " n"]
    """sum of squared distances of an expert's entries from that expert's own mean"""
    entries: int


def spread(X: Float[Tensor, "n p d"]) -> Spread:
    """Sum of the entries of each expert and their squared distance from its own mean, in float64."""
    sums = torch.stack([to_float64(expert).sum() for expert in X])
    entries = X.shape[1] * X.shape[2]
    squares = torch.stack(
        [(to_float64(x) - s / entries).square().sum() for x, s in zip(X, sums, strict=True)]
    )
    return Spread(sums, squares, entries)


def global_mean(spread: Spread) -> float:
    """Return the mean of all entries of all experts."""
    return float(spread.sums.sum()) / (spread.sums.numel() * spread.entries)


def explained_variance(errors: Float[Tensor, " n"], spread: Spread) -> float:
    """Return 1 - sum_i ||X_i - Xhat_i||^2 / sum_i ||X_i - mean||^2 with the mean of all entries.

    Negative when the approximation is worse than that mean; constant experts give 1 when reproduced and minus
    infinity when not.
    """
    centre = global_mean(spread)
    between = spread.entries * (spread.sums / spread.entries - centre).square().sum()
    return float(_explained(errors.sum(), spread.squares.sum() + between))


def explained_variance_per_expert(errors: Float[Tensor, " n"], spread: Spread) -> Float[Tensor, " n"]:
    """Return the same per expert, each about its own mean."""
    return _explained(errors, spread.squares)


def _explained(error: Float[Tensor, "*n"], variance: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    constant = torch.where(error == 0, 1.0, -math.inf).to(error)
    return torch.where(variance > 0, 1 - error / variance.clamp_min(1e-300), constant)


def energy_of_rank(X: Float[Tensor, "n p d"], r: int) -> float:
    """Return sum_i of the r largest squared singular values of X_i, ||A0||^2 of truncated SVDs that are not made."""
    return sum(float(singular_values(expert[None])[0, :r].square().sum()) for expert in X)


def singular_values(X: Float[Tensor, "n p d"]) -> Float[Tensor, "n k"]:
    """Return all min(p, d) singular values of each expert, largest first, from the smaller Gram matrix in float64.

    Values below 1e-8 of the largest are rounding.
    """
    spectra = []
    for expert in X:
        wide = to_float64(expert)
        gram = wide @ wide.mT if X.shape[1] <= X.shape[2] else wide.mT @ wide
        spectra.append(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt())
    return torch.stack(spectra)


def effective_rank(values: Float[Tensor, "n k"], share: float = 0.95) -> Int[Tensor, " n"]:
    """Return the fewest leading singular values whose squares hold `share` of the energy; 0 for a zero expert."""
    energy = values.square().cumsum(dim=1)
    total = energy[:, -1:]
    # a relative slack: a sum that meets the share exactly must not be missed by one rounding
    missed = energy < share * total * (1 - 1e-12)
    return torch.where(total.squeeze(1) > 0, missed.sum(dim=1) + 1, 0)


class SupportSummary(NamedTuple):
    """Number of atoms per expert."""

    mean: float
    median: float
    """the middle of the sorted counts, the mean of the middle two when n is even"""
    min: int
    max: int
    histogram: tuple[int, ...]
    """entry k is the number of experts that use exactly k atoms, k = 0..m"""


def support_sizes(codes: Float[Tensor, "n m"]) -> Int[Tensor, " n"]:
    """Return |supp alpha_i|, the number of codes above zero."""
    return (codes > 0).sum(dim=1)


def summarise_support(codes: Float[Tensor, "n m"]) -> SupportSummary:
    """Return mean, median, extremes and histogram of the support sizes."""
    sizes = support_sizes(codes)
    ordered = sizes.sort().values
    n = ordered.numel()
    median = (int(ordered[(n - 1) // 2]) + int(ordered[n // 2])) / 2
    histogram = torch.bincount(sizes, minlength=codes.shape[1] + 1)
    return SupportSummary(
        int(sizes.sum()) / n,
        median,
        int(ordered[0]),
        int(ordered[-1]),
        tuple(int(count) for count in histogram),
    )


def code_shares(codes: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """Return q_ij = alpha_ij / sum_j alpha_ij in float64; zero for an expert without codes."""
    wide = to_float64(codes)
    return wide / wide.sum(dim=1, keepdim=True).clamp_min(1e-300)


def entropy(codes: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
    """Return -sum_j q_ij log q_ij in nats, q_i = alpha_i / sum alpha_i: 0 for one atom, log m for equal codes."""
    q = code_shares(codes)
    return -torch.xlogy(q, q).sum(dim=1)


def effective_support(codes: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
    """Return S_eff = 1 / sum_j q_ij^2, q_i = alpha_i / sum alpha_i: k for k equal codes, 0 without codes."""
    weight = code_shares(codes).square().sum(dim=1)
    return torch.where(weight > 0, 1 / weight.clamp_min(1e-300), 0.0)


def zero_share(codes: Float[Tensor, "n m"]) -> float:
    """Share of the n m codes that are exactly zero."""
    return int((codes == 0).sum()) / codes.numel()


def pruned_share(before: Float[Tensor, "n m"], after: Float[Tensor, "n m"]) -> float:
    """Share of the codes that were above zero `before` and are zero `after`; 0 when there were none."""
    alive = int((before > 0).sum())
    return int(((before > 0) & (after == 0)).sum()) / alive if alive else 0.0


def atom_usage(codes: Float[Tensor, "n m"]) -> Int[Tensor, " m"]:
    """Return the number of experts that use each atom."""
    return (codes > 0).sum(dim=0)


def jaccard(first: Float[Tensor, "n m"], second: Float[Tensor, "n m"]) -> float:
    """Return the mean over the experts of |S_i and T_i| / |S_i or T_i| for the supports of two families' codes.

    Means something only when atom j of both is the same atom or the same group of experts. Two empty supports
    count as equal.
    """
    one, two = first > 0, second > 0
    both, either = (one & two).sum(dim=1), (one | two).sum(dim=1)
    return float(torch.where(either > 0, both / either.clamp_min(1), 1.0).mean())


def atom_norms(bank: Float[Tensor, "m r d"]) -> Float[Tensor, " m"]:
    """Return ||B_j||_F of every atom, in float64."""
    return torch.stack([to_float64(atom).square().sum().sqrt() for atom in bank])


class Coherence(NamedTuple):
    """Absolute cosines between different atoms."""

    mean: float
    max: float


def coherence(bank: Float[Tensor, "m r d"]) -> Coherence:
    """Return |<B_j, B_k>| / (||B_j|| ||B_k||) over j != k; 0 for a single atom, and for an atom of norm zero."""
    m = bank.shape[0]
    if m == 1:
        return Coherence(0.0, 0.0)
    flat = bank.reshape(m, -1)
    gram = torch.zeros(m, m, dtype=torch.float64)
    # in column blocks: one float64 copy of a whole bank would double its memory
    for block in flat.split(1 << 16, dim=1):
        wide = to_float64(block)
        gram += (wide @ wide.mT).cpu()
    norms = gram.diagonal().clamp_min(0).sqrt()
    cosine = gram / torch.outer(norms, norms).clamp_min(1e-300)
    apart = cosine.abs()[~torch.eye(m, dtype=torch.bool)].clamp(max=1.0)
    return Coherence(float(apart.mean()), float(apart.max()))


def condition_number(codes: Float[Tensor, "n m"]) -> float:
    """Return the condition number of alpha^T alpha (m, m): (largest / smallest singular value of alpha)^2.

    Infinite when the codes have no full column rank in float64: an unused atom, two atoms used in
    proportion, m > n.
    """
    n, m = codes.shape
    values = torch.linalg.svdvals(to_float64(codes))
    if m > n or float(values[-1]) <= float(values[0]) * max(n, m) * torch.finfo(torch.float64).eps:
        return math.inf
    return float(values[0] / values[-1]) ** 2
