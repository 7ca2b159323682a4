"""Where a fit begins: the first atoms of the bank, and the first codes.

Every method gives each atom a group of experts, never an empty one; `assignment_i` is the group of expert i.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.am.nnls import nnls_codes
from globe.am.warm_start import WarmStart, align, leading_eigenvectors, right_basis, truncated_svd
from globe.numerics.figures import squared_norms
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.precision import to_float64

SEEDINGS = ("random", "kmeans", "group_svd", "aligned", "aligned_svd")

JOINT = ("group_svd", "aligned_svd")
"""Seedings from all experts of a group together, which give more rows than one expert has, up to d."""
_LLOYD_STEPS = 50
"""k-means steps at most; on 60 trained experts it settles in fewer than five."""
_PAIRS = 8
"""Experts whose inner products with one expert are formed at once."""


def seed_bank(
    X: Float[Tensor, "n p d"],
    m: int,
    r: int,
    *,
    seeding: str,
    generator: torch.Generator,
    warm_start: WarmStart | None = None,
    group: ProcessGroup = ALONE,
) -> tuple[Float[Tensor, "m r d"], Int[Tensor, " all"]]:
    """Return the first atoms (orthonormal rows) and the group of every expert, for any 1 <= m <= n.

    random      right singular basis of one randomly picked expert per group
    group_svd   right singular basis of the stacked experts of each group, the minimiser over B of
                sum_i min_A ||X_i - A B||^2 for codes that are one-hot
    aligned, aligned_svd
                the atoms of `random` and `group_svd`, each rotated (orthogonal Procrustes) to the joint basis of
                all, so that mixtures of atoms do not cancel in arbitrary gauges
    kmeans      group_svd for groups found by k-means on the experts' second moments (`kmeans_groups`)

    Groups other than those of k-means are random and differ by at most one in size. `warm_start` saves the
    SVDs when they have been made with the same r. The generator must be on the CPU, so that a seed means
    the same on every device. Raises ValueError unless 1 <= m <= n and 1 <= r <= min(p, d), or on an unknown
    method.

    With several processes, X and `warm_start` are this one's experts, and k-means is not possible; bank and groups are
    those of all experts. At most m d^2 numbers are added up over the processes.
    """
    n, p, d = group.count(X.shape[0]), *X.shape[1:]
    if not 1 <= m <= n:
        raise ValueError(f"bank.m={m} is not between 1 and the {n} experts that share the bank")
    most = min(n * p, d) if seeding in JOINT else min(p, d)
    if not 1 <= r <= most:
        raise ValueError(f"bank.r={r} is not between 1 and {most}, which init.seeding={seeding} allows")
    order = torch.randperm(n, generator=generator)
    assignment = torch.empty(n, dtype=torch.int64)
    assignment[order] = torch.arange(n) % m
    match seeding:
        case "random" | "aligned":
            picks = order[:m].tolist()
            bank = _bases_of(X, picks, r, warm_start, group)
        case "group_svd" | "aligned_svd":
            bank = torch.stack([group_basis(X, assignment == atom, r, group) for atom in range(m)])
        case "kmeans":
            adapters, bases = warm_start or truncated_svd(X, r)
            # U of the SVD is a gauge: U S V^T and S V^T have the same second moment
            rows = bases * adapters.square().sum(dim=1).sqrt().unsqueeze(2)
            assignment = kmeans_groups(rows, m, generator=generator)
            bank = torch.stack([group_basis(rows, assignment == atom, r) for atom in range(m)])
        case _:
            raise ValueError(f"init.seeding={seeding!r} is not one of {', '.join(SEEDINGS)}")
    if seeding in ("aligned", "aligned_svd"):
        bank = align(bank, right_basis(bank.reshape(m * r, d), r).expand_as(bank))
    return bank, assignment.to(X.device)


def _bases_of(
    X: Float[Tensor, "n p d"], picks: list[int], r: int, warm_start: WarmStart | None, group: ProcessGroup
) -> Float[Tensor, "m r d"]:
    """Return the right singular bases of the picked experts, each made by the rank that holds it."""
    first = group.rows.start or 0
    bank = X.new_zeros(len(picks), r, X.shape[2])
    for at, pick in enumerate(picks):
        if 0 <= pick - first < len(X):
            one = right_basis(X[pick - first], r) if warm_start is None else warm_start.bases[pick - first]
            bank[at] = one
    return group.sum(bank)


def group_basis(
    X: Float[Tensor, "n rows d"], chosen: Tensor, r: int, group: ProcessGroup = ALONE
) -> Float[Tensor, "r d"]:
    """Return the top-r right singular basis of the chosen experts stacked below each other.

    Needs at most one d x d matrix in float64 beside an expert: the Gram matrix summed over the experts, or
    the stack itself while it has fewer rows than columns.
    """
    members = chosen.nonzero().squeeze(1)
    d = X.shape[2]
    here = group.own(chosen).nonzero().squeeze(1).tolist()
    if len(members) * X.shape[1] < d:
        stack = X[here]
        if len(here) < len(members):  # the others' experts come from their ranks
            stack = X.new_zeros(len(members), *X.shape[1:])
            first = group.rows.start or 0
            stack[torch.isin(members, torch.tensor(here) + first)] = X[here]
        return right_basis(group.sum(stack).reshape(-1, d), r)
    gram = to_float64(X[0]).new_zeros(d, d)
    for member in here:
        wide = to_float64(X[member])
        gram.addmm_(wide.mT, wide)
    return leading_eigenvectors(group.sum(gram), r).to(X)


def kmeans_groups(rows: Float[Tensor, "n k d"], m: int, *, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Group the experts by the directions they read, with k-means: m groups, none empty.

    Experts are compared by C_i = rows_i^T rows_i / ||.||_F, which no rotation of an expert's rows changes,
    through <C_i, C_j> = ||rows_i rows_j^T||_F^2 alone (kernel k-means, Dhillon, Guan, Kulis 2004), so no d
    x d matrix is made; n^2 k^2 d / 2 multiply-adds. Begins by k-means++ (Arthur, Vassilvitskii 2007); a
    group that runs empty takes the expert farthest from its own centre. An expert of zeros is at the same
    distance from all others.
    """
    kernel = _second_moment_kernel(rows)
    n = kernel.shape[0]
    square = kernel.diagonal()
    centres = [int(torch.randint(n, (1,), generator=generator))]
    nearest = square + square[centres[0]] - 2 * kernel[centres[0]]
    while len(centres) < m:
        # chosen experts weigh nothing, and equal experts (distance zero) are still drawn when nothing else
        # is left
        weight = nearest.clamp_min(1e-12)
        weight[centres] = 0
        centres.append(int(torch.multinomial(weight, 1, generator=generator)))
        nearest = torch.minimum(nearest, square + square[centres[-1]] - 2 * kernel[centres[-1]])
    distance = square.unsqueeze(1) + square[centres] - 2 * kernel[:, centres]
    groups = distance.argmin(dim=1)
    groups[centres] = torch.arange(m)
    for _ in range(_LLOYD_STEPS):
        members = torch.nn.functional.one_hot(groups, m).to(kernel.dtype)
        share = members / members.sum(dim=0)
        pull = kernel @ share
        distance = square.unsqueeze(1) - 2 * pull + (share * pull).sum(dim=0)
        moved = _without_empty(distance.argmin(dim=1), distance)
        if torch.equal(moved, groups):
            break
        groups = moved
    return groups


def _second_moment_kernel(rows: Float[Tensor, "n k d"]) -> Float[Tensor, "n n"]:
    """Return <C_i, C_j> / (||C_i|| ||C_j||) of C_i = rows_i^T rows_i, on the CPU in float64."""
    n = rows.shape[0]
    kernel = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for start in range(i, n, _PAIRS):
            others = rows[start : start + _PAIRS]
            kernel[i, start : start + _PAIRS] = squared_norms(rows[i] @ others.mT).cpu()
    kernel = kernel.triu() + kernel.triu(1).mT
    norms = kernel.diagonal().sqrt()
    kernel = kernel / torch.outer(norms, norms).clamp_min(1e-300)
    return kernel.fill_diagonal_(1.0)


def _without_empty(groups: Int[Tensor, " n"], distance: Float[Tensor, "n m"]) -> Int[Tensor, " n"]:
    """Return the same groups, each empty one given the farthest expert of a group that can spare it."""
    m = distance.shape[1]
    groups = groups.clone()
    for empty in (torch.bincount(groups, minlength=m) == 0).nonzero().squeeze(1).tolist():
        own = distance.gather(1, groups.unsqueeze(1)).squeeze(1)
        spare = torch.bincount(groups, minlength=m)[groups] > 1
        groups[torch.where(spare, own, -torch.inf).argmax()] = empty
    return groups


def first_codes(
    kind: str,
    bank: Float[Tensor, "m r d"],
    assignment: Int[Tensor, " n"],
    *,
    generator: torch.Generator,
    one_hot: float = 0.1,
    concentration: float = 2.0,
    bases: Float[Tensor, "n r d"] | None = None,
) -> Float[Tensor, "n m"]:
    """Return the first codes, in the dtype and on the device of the bank.

    mixed     one_hot e_g(i) + (1 - one_hot) Dirichlet(concentration): dense, so that every atom sees every
    expert.
              One-hot codes are a saddle: off-group codes get no gradient while each basis keeps its own gauge
    nnls      argmin over alpha_i >= 0 of ||Q_i B0_i - sum_j alpha_ij B_j||^2 for the warm start's bases B0,
    with the
              gauge Q_i from the expert's own atom first and from the mixture then
    simplex   the same with sum_j alpha_ij = 1

    `bases` is needed by the last two. No row is ever zero. The draw is made on the CPU in float64 from a
    seed that the generator gives. Raises ValueError on an unknown kind, or when bases are missing.
    """
    m = bank.shape[0]
    own = torch.nn.functional.one_hot(assignment, m).to(bank)
    if kind == "mixed":
        seed = int(torch.randint(2**63 - 1, (1,), generator=generator))
        draw = np.random.Generator(np.random.PCG64(seed)).dirichlet(
            np.full(m, concentration), len(assignment)
        )
        return one_hot * own + (1 - one_hot) * torch.from_numpy(draw).to(bank)
    if kind not in ("nnls", "simplex"):
        raise ValueError(f"init.codes={kind!r} is not one of mixed, nnls, simplex")
    if bases is None:
        raise ValueError(f"init.codes={kind} fits the bases of the warm start: pass them")
    flat = bank.reshape(m, -1)
    gram = flat @ flat.mT
    codes = own
    for _ in range(2):
        target = align(bases, (codes @ flat).view_as(bases))
        codes = nnls_codes(gram, target.flatten(1) @ flat.mT, simplex=kind == "simplex")
        codes = torch.where(codes.amax(dim=1, keepdim=True) > 0, codes, own)
    return codes
