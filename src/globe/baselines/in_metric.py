"""The closed forms in a metric of every expert's own: what they minimise is sum_i ||D_i (X_i - A_i B_g(i)) L_i||_F^2.

An expert by itself is whitened and stays a closed form. A basis that experts share is none any more, since each sees it
in another metric: it is found by alternating least squares from the one of the mean metric.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.am.records import Factors
from globe.am.refit import refit
from globe.am.warm_start import truncated_svd
from globe.baselines.group_svd import group_svd, k_subspaces
from globe.numerics.figures import squared_norms
from globe.numerics.input_metric import InputMetric
from globe.numerics.metric import Metric, root_of, times_inverse

ROUNDS = 20
"""Alternations of adapters and basis at most; each lowers the error."""
WORTH = 1e-3
"""They end once one lowers the error by less than this share."""
ITERATIONS = 12
"""Conjugate-gradient iterations for a basis whose adapters are given."""


def svd_in_metric(X: Float[Tensor, "n p d"], metric: InputMetric, *, r: int) -> Factors:
    """Return the best rank-r A_i B_i of every expert X = D_i X_i L_i: its truncated SVD, the basis times L_i^-1
    (SVD-LLM).
    """
    start, all_of = truncated_svd(X, r), slice(0, len(X))
    bases = start.bases if metric.columns is None else metric.columns.solved(start.bases, all_of)
    return Factors(bases, torch.eye(len(X)).to(X), start.adapters)


def mean_svd_in_metric(
    X: Float[Tensor, "n p d"], metric: InputMetric, *, r: int
) -> tuple[Factors, Float[Tensor, "p d"]]:
    """Return the best mean expert, then `svd_in_metric` of what is left beside it."""
    mean, rest = best_mean(X, metric), torch.empty_like(X)
    for i in range(len(X)):
        one = slice(i, i + 1)
        rest[one] = X[one] - metric.seen(mean[None], one)
    return svd_in_metric(rest, metric, r=r), mean


def best_mean(X: Float[Tensor, "n p d"], metric: InputMetric) -> Float[Tensor, "p d"]:
    """Return argmin over E of sum_i ||D_i (X_i - E) L_i||^2 for the experts X = D_i X_i L_i.

    With weights of rows its k-th row is (sum_i D_ik^2 x_ik C_i) (sum_i D_ik^2 C_i)^-1. A matrix D_i comes without L_i,
    and then the mean is (sum_i D_i^T D_i)^-1 sum_i D_i^T D_i X_i.
    """
    n, p, d = X.shape
    pulled = X.new_zeros(p, d)
    for i in range(n):
        pulled += metric.adjoint_weighted(X[i : i + 1], slice(i, i + 1))[0]
    if metric.rows is not None and metric.rows.dim() == 3:
        assert metric.columns is None
        return torch.linalg.solve(torch.einsum("nkp,nkq->pq", metric.rows, metric.rows), pulled)
    eye = torch.eye(d, dtype=X.dtype, device=X.device)
    systems = X.new_zeros(p, d, d)
    for i in range(n):
        C = eye if metric.columns is None else _square(metric.columns, slice(i, i + 1))
        weight = X.new_ones(p) if metric.rows is None else metric.rows[i].square()
        systems += weight[:, None, None] * C
    return torch.linalg.solve(systems, pulled.unsqueeze(2)).squeeze(2)


def group_svd_in_metric(
    X: Float[Tensor, "n p d"],
    metric: InputMetric,
    *,
    m: int,
    r: int,
    generator: torch.Generator | None = None,
) -> Factors:
    """Return one basis per group of experts; m = 1 is a basis that all share.

    Groups are those of the mean metric, which then move as long as an expert is better off with another basis.
    """
    columns = metric.columns
    if columns is None:
        return group_svd(X, m=m, r=r, generator=generator)
    B, groups = k_subspaces(columns.in_mean(X), m=m, r=r, generator=generator)
    B = times_inverse(B, root_of(columns.mean))
    for _ in range(ROUNDS if m > 1 else 1):
        B = torch.stack([alternated(X, columns, groups == j, basis) for j, basis in enumerate(B)])
        moved = _better(X, columns, B, groups)
        if torch.equal(moved, groups):
            break
        groups = moved
    A = torch.cat([_adapters(X, columns, i, B[groups[i]]) for i in range(len(X))])
    return Factors(B, torch.nn.functional.one_hot(groups, m).to(X), A)


def alternated(
    X: Float[Tensor, "n p d"], columns: Metric, chosen: Tensor, B: Float[Tensor, "r d"]
) -> Float[Tensor, "r d"]:
    """Return B of lower sum_i min_A ||X_i - A B L_i||^2 over the chosen experts X = X_i L_i, never of a higher one."""
    members = chosen.nonzero().squeeze(1).tolist()
    best, least = B, _error(X, columns, members, B)
    for _ in range(ROUNDS):
        new = _basis(X, columns, members, best)
        error = _error(X, columns, members, new)
        if not error < least:
            break
        small = error > (1 - WORTH) * least
        best, least = new, error
        if small:
            break
    return best


def _basis(
    X: Float[Tensor, "n p d"], columns: Metric, members: list[int], B: Float[Tensor, "r d"]
) -> Float[Tensor, "r d"]:
    """Return argmin over B of sum_i ||X_i - A_i B L_i||^2 for the adapters of the given B, by conjugate gradients.

    sum_i A_i^T A_i B C_i = sum_i A_i^T X_i L_i^T, preconditioned by the sums of A_i^T A_i and of C_i.
    """
    adapters = [_adapters(X, columns, i, B)[0] for i in members]
    grams = [A.T @ A for A in adapters]

    def curved(Y: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        total = torch.zeros_like(Y)
        for i, G in zip(members, grams, strict=True):
            root = columns.of(slice(i, i + 1)).view(Y.shape[1], -1)
            total += G @ ((Y @ root) @ root.T)
        return total

    residual = -curved(B)
    for i, A in zip(members, adapters, strict=True):
        residual += (A.T @ X[i]) @ columns.of(slice(i, i + 1)).view(B.shape[1], -1).T
    rows = _inverse(torch.stack(grams).sum(dim=0))
    cols = _inverse(columns.mean)
    step = torch.zeros_like(B)
    search = rows @ residual @ cols
    energy = (residual * search).sum()
    for _ in range(ITERATIONS):
        if not energy > 0:
            break
        product = curved(search)
        size = energy / (search * product).sum()
        step, residual = step + size * search, residual - size * product
        solved = rows @ residual @ cols
        energy, before = (residual * solved).sum(), energy
        search = solved + energy / before * search
    return B + step


def _inverse(C: Float[Tensor, "s s"]) -> Float[Tensor, "s s"]:
    ridge = 1e-6 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(C + ridge))


def _square(columns: Metric, one: slice) -> Float[Tensor, "d d"]:
    root = columns.of(one).reshape(columns.mean.shape)
    return root @ root.T


def _adapters(
    X: Float[Tensor, "n p d"], columns: Metric, i: int, B: Float[Tensor, "r d"]
) -> Float[Tensor, "1 p r"]:
    one = slice(i, i + 1)
    return refit(X[one], columns.times(B[None], one)).adapters


def _left(X: Float[Tensor, "n p d"], columns: Metric, i: int, B: Float[Tensor, "r d"]) -> float:
    one = slice(i, i + 1)
    M = columns.times(B[None], one)
    return float(squared_norms(X[one] - refit(X[one], M).adapters @ M))


def _error(X: Float[Tensor, "n p d"], columns: Metric, members: list[int], B: Float[Tensor, "r d"]) -> float:
    return sum(_left(X, columns, i, B) for i in members)


def _better(
    X: Float[Tensor, "n p d"], columns: Metric, B: Float[Tensor, "m r d"], groups: Int[Tensor, " n"]
) -> Int[Tensor, " n"]:
    """Move each expert into the group whose basis leaves least of it, if by more than rounding; none is emptied."""
    if len(B) == 1:
        return groups
    moved, sizes = groups.clone(), torch.bincount(groups, minlength=len(B))
    for i in range(len(X)):
        left = [_left(X, columns, i, basis) for basis in B]
        own, best = int(groups[i]), min(range(len(B)), key=left.__getitem__)
        if left[best] < left[own] * (1 - 1e-6) and sizes[own] > 1:
            moved[i] = best
            sizes[own] -= 1
            sizes[best] += 1
    return moved
