"""One basis per group of experts: the linear special case with one-hot codes, by alternating minimisation."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.am.records import Factors
from globe.am.seeding import group_basis
from globe.numerics.figures import squared_norms

MAX_ROUNDS = 20
"""Rounds of assignment at most; groups of experts are usually stable after a few."""

RESTARTS = 2
"""Random groupings that are tried besides the consecutive one. On 60 trained experts (m = 15, r = p/2) they
end at 0.428 where consecutive groups and those of k-means stay at 0.4295."""


def consecutive_groups(n: int, m: int) -> Int[Tensor, " n"]:
    """Return groups of neighbouring experts whose sizes differ by at most one, larger ones first."""
    sizes = torch.full((m,), n // m)
    sizes[: n % m] += 1
    return torch.repeat_interleave(torch.arange(m), sizes)


def group_bases(
    X: Float[Tensor, "n p d"], groups: Int[Tensor, " n"], *, m: int, r: int
) -> Float[Tensor, "m r d"]:
    """Return the best basis of every group: leading right singular vectors of its experts, stacked."""
    return torch.stack([group_basis(X, groups == j, r) for j in range(m)])


def captured_energy(X: Float[Tensor, "n p d"], B: Float[Tensor, "m r d"]) -> Float[Tensor, "n m"]:
    """Return ||X_i B_j^T||_F^2: what the orthonormal rows of B_j capture of expert i."""
    return torch.stack([squared_norms(X @ basis.mT) for basis in B], dim=1)


def k_subspaces(
    X: Float[Tensor, "n p d"], *, m: int, r: int, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "m r d"], Int[Tensor, " n"]]:
    """Minimise sum_i ||X_i - X_i B_g(i)^T B_g(i)||^2 over groups g and orthonormal rows B_j; return B and g.

    K-subspaces (Bradley, Mangasarian 2000) from consecutive groups and, given a generator on the CPU, from
    random ones besides; the best end is returned. Each round lowers the objective or is the last.
    """
    starts = [consecutive_groups(X.shape[0], m)]
    if generator is not None:
        orders = [torch.randperm(X.shape[0], generator=generator) for _ in range(RESTARTS)]
        starts += [starts[0][order] for order in orders]
    ends = [_descend(X, groups.to(X.device), m=m, r=r) for groups in starts]
    captured = [captured_energy(X, B).gather(1, groups[:, None]).sum().item() for B, groups in ends]
    return ends[captured.index(max(captured))]


def _descend(
    X: Float[Tensor, "n p d"], groups: Int[Tensor, " n"], *, m: int, r: int
) -> tuple[Float[Tensor, "m r d"], Int[Tensor, " n"]]:
    B = group_bases(X, groups, m=m, r=r)
    for _ in range(MAX_ROUNDS):
        moved = _move(captured_energy(X, B), groups, m=m)
        if torch.equal(moved, groups):
            break
        groups = moved
        B = group_bases(X, groups, m=m, r=r)
    return B, groups


def _move(energy: Float[Tensor, "n m"], groups: Int[Tensor, " n"], *, m: int) -> Int[Tensor, " n"]:
    """Move each expert into the group that captures most of it, if by more than rounding; none is emptied."""
    best, target = energy.max(1)
    gain = best - energy.gather(1, groups[:, None])[:, 0]
    sizes = torch.bincount(groups, minlength=m)
    moved = groups.clone()
    for i in torch.nonzero(gain > 1e-6 * best)[:, 0].tolist():
        if sizes[groups[i]] > 1:
            sizes[groups[i]] -= 1
            sizes[target[i]] += 1
            moved[i] = target[i]
    return moved


def group_svd(
    X: Float[Tensor, "n p d"], *, m: int, r: int, generator: torch.Generator | None = None
) -> Factors:
    """Return B_j, the basis of group j, one-hot codes, and A_i = X_i B_g(i)^T: least squares, as B_j B_j^T = I.

    m = 1 is `shared_basis`; m = n is `svd`.
    """
    B, groups = k_subspaces(X, m=m, r=r, generator=generator)
    codes = torch.nn.functional.one_hot(groups, m).to(X)
    return Factors(B, codes, X @ B[groups].mT)
