"""The objective at one point, with all that the steps need there: f = sum_i ||X_i - A_i phi_lam(Y_i)||_F^2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.activation import phi, phi_prime
from globe.am.chunks import expert_chunks
from globe.am.refit import Refit, refit


class Point(NamedTuple):
    """Bank and codes with their best adapters, and the first-order picture there.

    With A_i eliminated (variable projection), the gradient of f with respect to Y_i is -2 force_i.
    """

    adapters: Float[Tensor, "n p r"]
    gram: Float[Tensor, "n r r"]
    """A_i^T A_i"""
    rows: Float[Tensor, "n r d"]
    """Q_i, orthonormal rows that span the row space of M_i = phi_lam(Y_i)"""
    slope: Float[Tensor, "n r d"] | None
    """J_i = phi_lam'(Y_i); None is all ones"""
    force: Float[Tensor, "n r d"]
    """J_i * A_i^T (X_i - A_i M_i)"""
    errors: Float[Tensor, " n"]
    """||X_i - A_i M_i||_F^2"""
    objective: float
    """sum of `errors`"""
    regularised: int
    """refits that needed more than the smallest ridge"""


def mix(codes: Float[Tensor, "n m"], bank: Float[Tensor, "m r d"]) -> Float[Tensor, "n r d"]:
    """Mixed bases Y_i = sum_j codes_ij bank_j, as one matrix product."""
    return (codes @ bank.flatten(1)).unflatten(1, bank.shape[1:])


def evaluate(
    X: Float[Tensor, "n p d"],
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    *,
    lam: float,
    activation: str,
    lambda_A: float = 0.0,
    into: Point | None = None,
) -> Point:
    """Refit the adapters to (bank, codes) and return the point there.

    Runs in chunks of experts: beyond the result, only temporaries of one chunk exist. The objective is taken from
    the residual, never from a difference of squared norms, and summed in float64. `into` is a point of the same sizes
    that is of no more use: its large tensors are overwritten and become the result's. Raises FitError when the
    objective is not finite.
    """
    n, p, d = X.shape
    r = bank.shape[1]
    if into is None:
        adapters, gram = X.new_empty(n, p, r), X.new_empty(n, r, r)
        rows, force, slope = X.new_empty(n, r, d), X.new_empty(n, r, d), None
    else:
        adapters, gram, rows, force, slope = into.adapters, into.gram, into.rows, into.force, into.slope
    if lam == 0.0 or activation == "identity":
        slope = None
    elif slope is None:
        slope = X.new_empty(n, r, d)
    errors = X.new_empty(n)
    regularised = 0
    for part, Y, fit, residual in _refits(X, bank, codes, lam, activation, lambda_A):
        errors[part] = torch.linalg.vector_norm(residual, dim=(1, 2)) ** 2
        adapters[part], rows[part] = fit.adapters, fit.rows
        torch.bmm(fit.adapters.mT, fit.adapters, out=gram[part])
        torch.bmm(fit.adapters.mT, residual, out=force[part])
        if slope is not None:
            J = phi_prime(Y, lam=lam, activation=activation)
            assert J is not None
            slope[part] = J
            force[part] *= J
        regularised += fit.regularised
    return Point(adapters, gram, rows, slope, force, errors, _sum(errors), regularised)


def objective_at(
    X: Float[Tensor, "n p d"],
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    *,
    lam: float,
    activation: str,
    lambda_A: float = 0.0,
) -> float:
    """The objective of `evaluate` alone, which needs no memory beyond a chunk's."""
    refits = _refits(X, bank, codes, lam, activation, lambda_A)
    return _sum(torch.cat([torch.linalg.vector_norm(left, dim=(1, 2)) ** 2 for *_, left in refits]))


def _refits(
    X: Float[Tensor, "n p d"],
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    lam: float,
    activation: str,
    lambda_A: float,
) -> Iterator[tuple[slice, Float[Tensor, "_ r d"], Refit, Float[Tensor, "_ p d"]]]:
    """Chunk by chunk: which experts, their Y, their adapters, and the residual X - A M."""
    n, p, d = X.shape
    for part in expert_chunks(n, max(bank.shape[1], p), d):
        Y = mix(codes[part], bank)
        M = phi(Y, lam=lam, activation=activation)
        fit = refit(X[part], M, lambda_A=lambda_A)
        yield part, Y, fit, torch.baddbmm(X[part], fit.adapters, M, alpha=-1)


def _sum(errors: Float[Tensor, " n"]) -> float:
    return float(errors.double().sum() if errors.device.type != "mps" else errors.sum())
