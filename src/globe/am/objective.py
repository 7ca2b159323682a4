"""The objective at one point, with all that the steps need there.

    f = sum_i ||X_i - A_i M_i||_F^2 + rho_i ||A_i||_F^2,   M_i = phi_lam(Y_i),   rho_i = ridge ||M_i||_F^2 / r

The ridge is lambda_A or the smallest that the refit needs (`ridge_of`). The first part is the error, which is what a
fit reports; the steps lower f. In a metric M_i = phi_lam(Y_i) L_i, for experts X_i that L_i is part of already, and
gradients in phi_lam(Y_i) are those in M_i times L_i^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import StepOptions
from globe.am.refit import Refit, refit, ridge_of
from globe.numerics.activation import phi, phi_prime
from globe.numerics.chunks import expert_chunks
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.metric import Metric

_WORTH_RELEASING = 1 << 24
"""Bytes of a tensor that is released; its pages are its own by then: `globe.numerics.device.keep_less_memory`."""


class Point(NamedTuple):
    """Bank and codes with their best adapters, and the first-order picture there.

    With A_i eliminated (variable projection), the gradient of f with respect to Y_i is -2 force_i. The ridge follows
    the size of M_i, so f does not change when a basis grows and its adapter shrinks by the same factor. Without the
    ridge's own part the force would point along the bases, and every step would make them larger without end.
    """

    adapters: Float[Tensor, "n p r"] | None
    """None in a fit's points, which need them only at the end: `adapters_at`"""
    gram: Float[Tensor, "n r r"]
    """A_i^T A_i"""
    rows: Float[Tensor, "n r d"]
    """Q_i, orthonormal rows that span the row space of M_i = phi_lam(Y_i) L_i"""
    slope: Float[Tensor, "n r d"] | None
    """J_i = phi_lam'(Y_i); None is all ones"""
    force: Float[Tensor, "n r d"]
    """J_i * (A_i^T (X_i - A_i M_i) - rho_i ||A_i||_F^2 M_i / ||M_i||_F^2) L_i^T"""
    errors: Float[Tensor, " n"]
    """||X_i - A_i M_i||_F^2"""
    penalties: Float[Tensor, " n"]
    """rho_i ||A_i||_F^2"""
    error: float
    """sum of `errors`, over all processes"""
    objective: float
    """`error` and the sum of `penalties`, over all processes: what the steps lower"""
    regularised: int
    """refits, of all processes, that were too ill-conditioned for Cholesky"""
    metric: Metric | None = None
    """L_i; None is the identity"""


def mix(codes: Float[Tensor, "n m"], bank: Float[Tensor, "m r d"]) -> Float[Tensor, "n r d"]:
    """Return the mixed bases Y_i = sum_j codes_ij bank_j, by one matrix product."""
    return (codes @ bank.flatten(1)).unflatten(1, bank.shape[1:])


def evaluate(
    X: Float[Tensor, "n p d"],
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    options: StepOptions,
    *,
    metric: Metric | None = None,
    into: Point | None = None,
    group: ProcessGroup = ALONE,
) -> Point:
    """Refit the adapters to (bank, codes) under `options.lam`, activation and lambda_A, and return the point there.

    Runs in chunks of experts: beyond the result, only temporaries of one chunk exist. The objective is taken from
    the residual, never from a difference of squared norms, and summed in float64. `into` is a point of the same sizes
    that is of no more use: its large tensors are overwritten and become the result's; if it goes without adapters,
    so does the result. Raises FitError when the objective is not finite.
    """
    n, p, d = X.shape
    r = bank.shape[1]
    if into is None:
        adapters: Tensor | None = X.new_empty(n, p, r)
        gram, rows, force, slope = X.new_empty(n, r, r), X.new_empty(n, r, d), X.new_empty(n, r, d), None
    else:
        adapters, gram, rows, force, slope = into.adapters, into.gram, into.rows, into.force, into.slope
        _take_again(adapters, gram, rows, force, slope)
    if options.lam == 0.0 or options.activation == "identity":
        slope = None
    elif slope is None:
        slope = X.new_empty(n, r, d)
    errors, penalties, regularised = X.new_empty(n), X.new_empty(n), 0
    ridge = ridge_of(options.lambda_A, X.dtype) / r
    for part, fit, M, residual in _refits(X, bank, codes, options, metric, slope):
        errors[part] = torch.linalg.vector_norm(residual, dim=(1, 2)) ** 2
        rows[part] = fit.rows
        if adapters is not None:
            adapters[part] = fit.adapters
        torch.bmm(fit.adapters.mT, fit.adapters, out=gram[part])
        torch.bmm(fit.adapters.mT, residual, out=force[part])
        price = ridge * torch.linalg.vector_norm(fit.adapters, dim=(1, 2)) ** 2
        penalties[part] = price * torch.linalg.vector_norm(M, dim=(1, 2)) ** 2
        force[part].addcmul_(M, price[:, None, None], value=-1)
        if metric is not None:
            force[part] = metric.adjoint(force[part], part)
        if slope is not None:
            force[part] *= slope[part]
        regularised += fit.regularised
        del fit, M, residual  # before the next chunk makes its own
    error, regularised = group.total(_sum(errors)), int(group.total(regularised))
    objective = error + group.total(_sum(penalties))
    return Point(adapters, gram, rows, slope, force, errors, penalties, error, objective, regularised, metric)


def error_at(
    X: Float[Tensor, "n p d"],
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    options: StepOptions,
    *,
    metric: Metric | None = None,
    group: ProcessGroup = ALONE,
) -> float:
    """Return the error of `evaluate` alone, which needs no memory beyond a chunk's."""
    refits = _refits(X, bank, codes, options, metric)
    errors = torch.cat([torch.linalg.vector_norm(left, dim=(1, 2)) ** 2 for *_, left in refits])
    return group.total(_sum(errors))


def adapters_at(
    X: Float[Tensor, "n p d"],
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    options: StepOptions,
    *,
    metric: Metric | None = None,
) -> Float[Tensor, "n p r"]:
    """Return the adapters of `evaluate` alone, with the same bits."""
    adapters = X.new_empty(*X.shape[:2], bank.shape[1])
    for part, fit, *_ in _refits(X, bank, codes, options, metric):
        adapters[part] = fit.adapters
    return adapters


def release(*tensors: Tensor | None) -> None:
    """Free the memory of large tensors whose numbers are spent, whoever still refers to them.

    `evaluate` takes it again. Small ones are left: an allocator keeps what they give back.
    """
    for tensor in tensors:
        if tensor is None or tensor.device.type not in ("cpu", "cuda"):
            continue
        if tensor.untyped_storage().nbytes() >= _WORTH_RELEASING:
            tensor.untyped_storage().resize_(0)


def _take_again(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage().nbytes() == 0:
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())


def _refits(
    X: Float[Tensor, "n p d"],
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    options: StepOptions,
    metric: Metric | None,
    slope: Float[Tensor, "n r d"] | None = None,
) -> Iterator[tuple[slice, Refit, Float[Tensor, "_ r d"], Float[Tensor, "_ p d"]]]:
    """Yield, chunk by chunk, the experts, their adapters, their bases M and the residual X - A M.

    phi' is written into `slope` where that is given.
    """
    n, p, d = X.shape
    for part in expert_chunks(n, max(bank.shape[1], p), d):
        Y = mix(codes[part], bank)
        M = phi(Y, lam=options.lam, activation=options.activation)
        if slope is not None:
            J = phi_prime(Y, lam=options.lam, activation=options.activation, image=M)
            assert J is not None
            slope[part] = J
            del J
        del Y
        if metric is not None:
            M = metric.times(M, part)
        own = X[part]
        fit = refit(own, M, lambda_A=options.lambda_A)
        residual = torch.bmm(fit.adapters, M)
        torch.sub(own, residual, out=residual)
        del own
        yield part, fit, M, residual
        del fit, M, residual  # before the next chunk's are made


def _sum(errors: Float[Tensor, " n"]) -> float:
    return float(errors.double().sum() if errors.device.type != "mps" else errors.sum())
