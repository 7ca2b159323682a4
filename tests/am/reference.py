"""Slow, obvious float64 versions of the pieces of a fit, written from their formulas.

Loops over experts and atoms, dense Jacobians, LAPACK least squares. Nothing here is shared with `globe.am`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
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
