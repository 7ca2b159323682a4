"""The closed forms in a metric of every expert's own: what they minimise is sum_i ||D_i (X_i - A_i B_g(i)) L_i||_F^2.

An expert by itself is whitened and stays a closed form. A basis that experts share is none any more, since each sees it
in another metric: it is found by alternating least squares from the one of the mean metric.
"""

from __future__ import annotations

from collections.abc import Callable

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
"""Conjugate-gradient iterations for a basis whose adapters are given, or a mean beside given low ranks."""


def svd_in_metric(X: Float[Tensor, "n p d"], metric: InputMetric, *, r: int) -> Factors:
    """Return the truncated SVD A_i B_i of every expert X = D_i X_i L_i, its basis times L_i^-1 (SVD-LLM)."""
    start, all_of = truncated_svd(X, r), slice(0, len(X))
    bases = start.bases if metric.columns is None else metric.columns.solved(start.bases, all_of)
    return Factors(bases, torch.eye(len(X)).to(X), start.adapters)


def mean_svd_in_metric(
    X: Float[Tensor, "n p d"], metric: InputMetric, *, r: int
) -> tuple[Factors, Float[Tensor, "p d"]]:
    """Return a mean expert E and the rank-r A_i B_i of what it leaves, of low sum_i ||D_i (X_i - E - A_i B_i) L_i||^2.

    The two are fitted in turn, each to what the other leaves, from no mean or the plain mean, whichever leaves less: so
    the error is never above that of `svd_in_metric` of the same rank. A mean fitted by itself would fill the directions
    and rows that hardly count with anything, which low ranks then can't undo.
    """
    plain = torch.stack([metric.unseen(X[i : i + 1], slice(i, i + 1))[0] for i in range(len(X))]).mean(0)
    starts = [(mean, _beside(X, metric, mean, r)) for mean in (torch.zeros_like(plain), plain)]
    mean, (factors, left) = min(starts, key=lambda one: one[1][1])
    for _ in range(ROUNDS):
        moved = better_mean(X, metric, mean, factors)
        found, error = _beside(X, metric, moved, r)
        if not error < left:
            break
        small = error > (1 - WORTH) * left
        mean, factors, left = moved, found, error
        if small:
            break
    bases = factors.bank if metric.columns is None else metric.columns.solved(factors.bank, slice(0, len(X)))
    return factors._replace(bank=bases), mean


def _beside(
    X: Float[Tensor, "n p d"], metric: InputMetric, mean: Float[Tensor, "p d"], r: int
) -> tuple[Factors, float]:
    """Return the best rank-r A_i B_i L_i of every D_i (X_i - E) L_i, and the squared error left."""
    rest = torch.empty_like(X)
    for i in range(len(X)):
        one = slice(i, i + 1)
        rest[one] = X[one] - metric.seen(mean[None], one)
    start = truncated_svd(rest, r)
    left = sum(
        float(squared_norms(rest[i : i + 1] - A @ B)) for i, (A, B) in enumerate(zip(*start, strict=True))
    )
    return Factors(start.bases, torch.eye(len(X)).to(X), start.adapters), left


def better_mean(
    X: Float[Tensor, "n p d"], metric: InputMetric, mean: Float[Tensor, "p d"], factors: Factors
) -> Float[Tensor, "p d"]:
    """Return E of lower sum_i ||X_i - D_i E L_i - A_i B_i||^2, by conjugate gradients from `mean`.

    X, the adapters and the bases (the bank, one for each expert) are as the metric sees them.
    """
    n = len(X)

    def curved(Y: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        parts = (slice(i, i + 1) for i in range(n))
        return torch.stack([metric.adjoint_weighted(metric.seen(Y[None], one), one)[0] for one in parts]).sum(
            0
        )

    residual = -curved(mean)
    for i in range(n):
        low = factors.adapters[i] @ factors.bank[i]
        residual += metric.adjoint_weighted((X[i] - low)[None], slice(i, i + 1))[0]
    columns = None if metric.columns is None else _inverse(metric.columns.mean)
    rows = _inverse_rows(metric.rows)

    def solved(F: Float[Tensor, "p d"]) -> Float[Tensor, "p d"]:
        F = F if columns is None else F @ columns
        return F if rows is None else rows[:, None] * F if rows.dim() == 1 else rows @ F

    return mean + _conjugate_gradients(residual, curved, solved)


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
    return B + _conjugate_gradients(residual, curved, lambda F: rows @ F @ cols)


def _conjugate_gradients(
    residual: Float[Tensor, "a b"],
    curved: Callable[[Tensor], Tensor],
    solved: Callable[[Tensor], Tensor],
) -> Float[Tensor, "a b"]:
    """Return Y with curved(Y) near `residual`; `solved` is the preconditioner. Every iteration lowers the quadratic."""
    step, search = torch.zeros_like(residual), solved(residual)
    energy = (residual * search).sum()
    for _ in range(ITERATIONS):
        if not energy > 0:
            break
        product = curved(search)
        size = energy / (search * product).sum()
        step, residual = step + size * search, residual - size * product
        preconditioned = solved(residual)
        energy, before = (residual * preconditioned).sum(), energy
        search = preconditioned + energy / before * search
    return step


def _inverse(C: Float[Tensor, "s s"]) -> Float[Tensor, "s s"]:
    ridge = 1e-6 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(C + ridge))


def _inverse_rows(rows: Tensor | None) -> Tensor | None:
    """Return (sum_i D_i^T D_i)^-1: None, the diagonal (p,), or a matrix (p, p)."""
    if rows is None:
        return None
    return 1 / rows.square().sum(0) if rows.dim() == 2 else _inverse(torch.einsum("nkp,nkq->pq", rows, rows))


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
