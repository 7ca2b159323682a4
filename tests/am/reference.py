"""Slow, obvious float64 versions of the pieces of a fit, written from their formulas.

Loops over experts and atoms, dense Jacobians, LAPACK least squares. Nothing here is shared with `globe.am`.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def activate(Y: Tensor, *, lam: float, activation: str) -> Tensor:
    """(1 - lam) y + lam act(y), from the textbook formulas."""
    match activation:
        case "identity":
            act = Y
        case "silu":
            act = Y / (1 + torch.exp(-Y))
        case "tanh":
            act = 1 - 2 / (torch.exp(2 * Y) + 1)
        case "gelu":
            act = Y * (1 + torch.erf(Y / math.sqrt(2))) / 2
        case _:
            raise AssertionError(activation)
    return (1 - lam) * Y + lam * act


def slope(Y: Tensor, *, lam: float, activation: str) -> Tensor:
    """d phi_lam / dY by automatic differentiation."""
    Y = Y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(activate(Y, lam=lam, activation=activation).sum(), Y)
    return gradient


def mixed(codes: Float[Tensor, "n m"], bank: Float[Tensor, "m r d"]) -> Float[Tensor, "n r d"]:
    Y = []
    for row in codes:
        total = torch.zeros_like(bank[0])
        for code, atom in zip(row, bank, strict=True):
            total = total + code * atom
        Y.append(total)
    return torch.stack(Y)


def least_squares(left: Tensor, right: Tensor) -> Tensor:
    """argmin_x ||left x - right||_F, by LAPACK's SVD."""
    return torch.from_numpy(np.linalg.lstsq(left.numpy(), right.numpy(), rcond=None)[0])


class ReferencePoint(NamedTuple):
    """Adapters, projectors and the first-order picture at (bank, codes)."""

    adapters: Float[Tensor, "n p r"]
    projectors: Float[Tensor, "n d d"] | None
    """onto the row space of M_i, shrunk by the ridge if there is one; None in a metric"""
    kept: Float[Tensor, "n d d"]
    """K_i = C_i - C_i M_i^T (M_i C_i M_i^T + ridge)^-1 M_i C_i: the metric of what the adapters leave"""
    slopes: Float[Tensor, "n r d"]
    residual: Float[Tensor, "n p d"]
    force: Float[Tensor, "n r d"]
    objective: float
    """with the price of the ridge"""


def point(
    X: Float[Tensor, "n p d"],
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    *,
    lam: float,
    activation: str,
    lambda_A: float = 0.0,
    C: Float[Tensor, "n d d"] | None = None,
) -> ReferencePoint:
    """A_i = argmin ||X_i - A M_i||^2 + rho_i ||A||^2 with rho_i = lambda_A mean(diag M_i M_i^T).

    With metrics C_i every norm of rows, ||E||^2, is tr(E C_i E^T), and M_i M_i^T is M_i C_i M_i^T.
    """
    if C is not None:
        return _point_in_metric(X, bank, codes, C, lam=lam, activation=activation, lambda_A=lambda_A)
    Y = mixed(codes, bank)
    J = slope(Y, lam=lam, activation=activation)
    adapters, projectors, residuals, forces = [], [], [], []
    penalty = 0.0
    for i in range(len(X)):
        M = activate(Y[i], lam=lam, activation=activation)
        r = len(M)
        rho = max(lambda_A, 1e-14) * float((M * M).sum()) / r
        wide = torch.cat([M, math.sqrt(rho) * torch.eye(r, dtype=M.dtype)], dim=1)
        padded = torch.cat([X[i], torch.zeros(X.shape[1], r, dtype=M.dtype)], dim=1)
        A = least_squares(wide.T, padded.T).T
        adapters.append(A)
        projectors.append(M.T @ least_squares(M @ M.T + rho * torch.eye(r, dtype=M.dtype), M))
        residuals.append(X[i] - A @ M)
        # the ridge grows with M_i: d rho_i / d M_i = 2 lambda_A M_i / r
        forces.append(J[i] * (A.T @ residuals[i] - rho * float((A * A).sum()) / float((M * M).sum()) * M))
        penalty += rho * float((A * A).sum())
    residual = torch.stack(residuals)
    eye = torch.eye(X.shape[2], dtype=X.dtype)
    return ReferencePoint(
        torch.stack(adapters),
        torch.stack(projectors),
        eye - torch.stack(projectors),
        J,
        residual,
        torch.stack(forces),
        float((residual**2).sum()) + penalty,
    )


def _point_in_metric(
    X: Float[Tensor, "n p d"],
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    C: Float[Tensor, "n d d"],
    *,
    lam: float,
    activation: str,
    lambda_A: float,
) -> ReferencePoint:
    """By the normal equations in C_i, without any root of it."""
    Y = mixed(codes, bank)
    J = slope(Y, lam=lam, activation=activation)
    adapters, kept, residuals, forces, total = [], [], [], [], 0.0
    for i in range(len(X)):
        M = activate(Y[i], lam=lam, activation=activation)
        gram = M @ C[i] @ M.T
        size = float(gram.trace())
        rho = max(lambda_A, 1e-14) * size / len(M)
        gram = gram + rho * torch.eye(len(M), dtype=M.dtype)
        A = torch.linalg.solve(gram, M @ C[i] @ X[i].T).T
        left = X[i] - A @ M
        adapters.append(A)
        kept.append(C[i] - C[i] @ M.T @ torch.linalg.solve(gram, M @ C[i]))
        residuals.append(left)
        forces.append(J[i] * ((A.T @ left - rho * float((A * A).sum()) / size * M) @ C[i]))
        total += float((left @ C[i] @ left.T).trace()) + rho * float((A * A).sum())
    stacked = (torch.stack(one) for one in (adapters, kept, residuals, forces))
    A_, kept_, residual, force = stacked
    return ReferencePoint(A_, None, kept_, J, residual, force, total)


def reduced_objective(
    X: Float[Tensor, "n p d"],
    Y: Float[Tensor, "n r d"],
    *,
    lam: float,
    activation: str,
    lambda_A: float = 0.0,
) -> Tensor:
    """min over A of sum_i ||X_i - A_i phi(Y_i)||^2 + rho_i ||A_i||^2, differentiable in Y, and in rho_i through it."""
    total = torch.zeros((), dtype=X.dtype)
    for x, y in zip(X, Y, strict=True):
        M = activate(y, lam=lam, activation=activation)
        rho = lambda_A * (M * M).sum() / len(M)
        A = torch.linalg.solve(M @ M.T + rho * torch.eye(len(M), dtype=M.dtype), M @ x.T).T
        total = total + ((x - A @ M) ** 2).sum() + rho * (A**2).sum()
    return total


class Moves(NamedTuple):
    """Unit moves of the unknowns and the change of all mixed bases that each makes."""

    names: list[tuple[str, tuple[int, ...]]]
    changes: Float[Tensor, "u n r d"]


def unit_moves(
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    *,
    left: Float[Tensor, "m r k"] | None,
    right: Float[Tensor, "m k d"] | None,
    free: Bool[Tensor, "n m"] | None,
    joint: bool,
) -> Moves:
    n, m = codes.shape
    names: list[tuple[str, tuple[int, ...]]] = []
    changes = []

    def add(name: str, index: tuple[int, ...], change: Tensor) -> None:
        names.append((name, index))
        changes.append(change)

    def of_atom(j: int, change: Tensor) -> Tensor:
        return torch.stack([codes[i, j] * change for i in range(n)])

    if left is None or right is None:
        for j, a, b in itertools.product(*map(range, bank.shape)):
            unit = torch.zeros_like(bank[0])
            unit[a, b] = 1
            add("bank", (j, a, b), of_atom(j, unit))
    else:
        for j, a, b in itertools.product(*map(range, left.shape)):
            unit = torch.zeros_like(left[0])
            unit[a, b] = 1
            add("left", (j, a, b), of_atom(j, unit @ right[j]))
        for j, a, b in itertools.product(*map(range, right.shape)):
            unit = torch.zeros_like(right[0])
            unit[a, b] = 1
            add("right", (j, a, b), of_atom(j, left[j] @ unit))
    if joint:
        for i, j in itertools.product(range(n), range(m)):
            if free is None or bool(free[i, j]):
                change = torch.zeros(n, *bank.shape[1:], dtype=bank.dtype)
                change[i] = bank[j]
                add("codes", (i, j), change)
    return Moves(names, torch.stack(changes))


def gauss_newton(
    at: ReferencePoint,
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    *,
    damping: dict[str, float],
    left: Float[Tensor, "m r k"] | None = None,
    right: Float[Tensor, "m k d"] | None = None,
    free: Bool[Tensor, "n m"] | None = None,
    joint: bool = True,
    ridge: float = 0.0,
    force: Float[Tensor, "n r d"] | None = None,
) -> dict[str, Tensor]:
    """The minimiser d of the quadratic model, from its dense normal matrix.

    sum_i <A_i^T A_i (J_i * dY_i)(I - P_i), J_i * dY_i> - 2 <force_i, dY_i> + damping ||d||^2 + ridge ||bank + dB||^2.
    Where the codes have independent columns, ||dB||^2 stands for sum_i ||dY_i(dB)||^2 = <dB, (codes^T codes) dB>, and
    likewise in the ridge. With low-rank atoms the ridge is on the left factors.
    """
    names, changes = unit_moves(bank, codes, left=left, right=right, free=free, joint=joint)
    gram = at.adapters.mT @ at.adapters
    seen = changes * at.slopes
    weighted = gram @ seen @ at.kept
    H = weighted.flatten(1) @ seen.flatten(1).T
    g = changes.flatten(1) @ (at.force if force is None else force).flatten()

    independent = left is None and len(codes) >= len(bank) and torch.linalg.cond(codes) < 1e3
    overlap = codes.T @ codes if independent else torch.eye(len(bank), dtype=bank.dtype)
    first = bank if left is None else left
    for u, (name, index) in enumerate(names):
        for v, (other, there) in enumerate(names):
            if name != other:
                continue
            if name == "bank":
                metric = float(overlap[index[0], there[0]]) * (index[1:] == there[1:])
            else:
                metric = float(index == there)
            H[u, v] += (damping[name] + (ridge if name in ("bank", "left") else 0.0)) * metric
            if name in ("bank", "left"):
                g[u] -= ridge * metric * first[there]
    solution = torch.linalg.solve(H, g)
    found = {"codes": torch.zeros_like(codes)} if joint else {}
    for name, like in (("bank", bank), ("left", left), ("right", right)):
        if like is not None and any(name == known for known, _ in names):
            found[name] = torch.zeros_like(like)
    for value, (name, index) in zip(solution, names, strict=True):
        found[name][index] = value
    return found


def code_system(
    at: ReferencePoint, bank: Float[Tensor, "m r d"]
) -> tuple[Float[Tensor, "n m m"], Float[Tensor, "n m"]]:
    """K_i[j, l] = <A_i (J_i * B_j) K_i, A_i (J_i * B_l)>, h_i[j] = <B_j, force_i>, K_i = I - P_i or as in a metric."""
    n, m = len(at.adapters), len(bank)
    K, h = torch.zeros(n, m, m, dtype=bank.dtype), torch.zeros(n, m, dtype=bank.dtype)
    for i, j in itertools.product(range(n), range(m)):
        one = at.adapters[i] @ (at.slopes[i] * bank[j]) @ at.kept[i]
        h[i, j] = (bank[j] * at.force[i]).sum()
        for l in range(m):
            K[i, j, l] = (one * (at.adapters[i] @ (at.slopes[i] * bank[l]))).sum()
    return K, h


def best_codes(
    K: Float[Tensor, "m m"],
    h: Float[Tensor, " m"],
    present: Float[Tensor, " m"],
    *,
    price: Float[Tensor, " m"] | float = 0.0,
    simplex: bool = False,
    support: Bool[Tensor, " m"] | None = None,
) -> Float[Tensor, " m"]:
    """argmin over a >= 0 of 1/2 (a - present)^T K (a - present) - h^T (a - present) + price^T a.

    By trying every set of atoms in use; the sum is one with `simplex`.
    """
    m = len(h)
    H = K @ present + h - price
    best, lowest = torch.zeros(m, dtype=K.dtype), math.inf if simplex else 0.0
    for size in range(1, m + 1):
        for used in itertools.combinations(range(m), size):
            if support is not None and not all(bool(support[j]) for j in used):
                continue
            index = torch.tensor(used)
            system, right = K[index][:, index], H[index]
            if simplex:
                one = torch.ones(size, 1, dtype=K.dtype)
                system = torch.cat(
                    [torch.cat([system, one], 1), torch.cat([one.T, torch.zeros(1, 1).double()], 1)]
                )
                right = torch.cat([right, torch.ones(1, dtype=K.dtype)])
            values = torch.linalg.solve(system, right)[:size]
            if float(values.min()) < 0:
                continue
            a = torch.zeros(m, dtype=K.dtype)
            a[index] = values
            value = float(0.5 * a @ K @ a - H @ a)
            if value < lowest:
                best, lowest = a, value
    return best


def price_of_codes(
    diagonal: Float[Tensor, " m"], present: Float[Tensor, " m"], bank: Float[Tensor, "m r d"]
) -> Float[Tensor, " m"]:
    """The gradient of ||u||_1 / ||u||_2 in the codes, u_j = a_j ||B_j||, by automatic differentiation.

    In the units of K: times ||u||_2 mean(u) mean(diag K_jj / ||B_j||^2).
    """
    norms = torch.stack([torch.sqrt((atom**2).sum()) for atom in bank])
    a = present.clone().requires_grad_()
    u = a * norms
    (gradient,) = torch.autograd.grad(u.sum() / (u**2).sum().sqrt(), a)
    u = u.detach()
    return gradient * (u**2).sum().sqrt() * u.mean() * (diagonal / norms**2).mean()


def mod(
    targets: Float[Tensor, "n r d"],
    codes: Float[Tensor, "n m"],
    bank: Float[Tensor, "m r d"],
    *,
    lambda_B: float = 0.0,
) -> Float[Tensor, "m r d"]:
    """argmin_B sum_i ||T_i - sum_j alpha_ij B_j||^2 + rho ||B - bank||^2, rho = lambda_B mean(diag codes^T codes)."""
    m = len(bank)
    rho = lambda_B * float((codes**2).sum()) / m
    tall = torch.cat([codes, math.sqrt(rho) * torch.eye(m, dtype=codes.dtype)])
    right = torch.cat([targets.flatten(1), math.sqrt(rho) * bank.flatten(1)])
    return least_squares(tall, right).view_as(bank)


def weight_aware(
    X: Float[Tensor, "n p d"], A: Float[Tensor, "n p r"], *, lambda_T: float = 0.0
) -> Float[Tensor, "n r d"]:
    """argmin_T ||X_i - A_i T||^2 + rho_i ||T||^2, rho_i = lambda_T mean(diag A_i^T A_i)."""
    found = []
    for x, a in zip(X, A, strict=True):
        r = a.shape[1]
        rho = lambda_T * float((a**2).sum()) / r
        tall = torch.cat([a, math.sqrt(rho) * torch.eye(r, dtype=a.dtype)])
        found.append(least_squares(tall, torch.cat([x, torch.zeros(r, x.shape[1], dtype=x.dtype)])))
    return torch.stack(found)


def aligned(bases: Float[Tensor, "n r d"], target: Float[Tensor, "n r d"]) -> Float[Tensor, "n r d"]:
    """Each basis turned by SciPy's orthogonal Procrustes to its target, then at the target's norm."""
    turned = []
    for basis, wanted in zip(bases.numpy(), target.numpy(), strict=True):
        turn, _ = scipy.linalg.orthogonal_procrustes(basis.T, wanted.T)
        found = (basis.T @ turn).T
        turned.append(found * np.linalg.norm(wanted) / np.linalg.norm(basis))
    return torch.from_numpy(np.stack(turned))


def equal_norms(
    bank: Float[Tensor, "m r d"], codes: Float[Tensor, "n m"]
) -> tuple[Float[Tensor, "m r d"], Float[Tensor, "n m"]]:
    """Atoms at the root mean square of their norms, codes scaled by the inverse; zero atoms stay."""
    norms = [math.sqrt(float((atom**2).sum())) for atom in bank]
    common = math.sqrt(sum(norm**2 for norm in norms) / len(norms))
    bank, codes = bank.clone(), codes.clone()
    for j, norm in enumerate(norms):
        if norm > 0:
            bank[j] *= common / norm
            codes[:, j] *= norm / common
    return bank, codes
