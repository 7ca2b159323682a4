"""The adapter refit: ridged least squares by Cholesky or QR, and what the dictionary step needs of its factor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.errors import FitError

_TRUSTED = 1e-2
"""Rounding, times mean(diag S_i) max(diag S_i^{-1}), up to which a Cholesky factor is trusted. A ridge of 1e-4 stays
below it in float32."""


class Refit(NamedTuple):
    """A_i and Q_i of one refit."""

    adapters: Float[Tensor, "n p r"]
    rows: Float[Tensor, "n r d"]
    """Q_i: orthonormal rows that span the row space of M_i"""
    regularised: int
    """experts whose Gram matrix was too ill-conditioned for Cholesky, and which were solved by QR"""


def ridge_of(lambda_A: float, dtype: torch.dtype) -> float:
    """Return the relative ridge of the refit: lambda_A, but at least 1e-7 in float32 and 1e-14 in float64."""
    return max(lambda_A, 1e-7 if dtype == torch.float32 else 1e-14)


def refit(X: Float[Tensor, "n p d"], M: Float[Tensor, "n r d"], *, lambda_A: float = 0.0) -> Refit:
    """Return A_i = argmin_A ||X_i - A M_i||_F^2 + rho_i ||A||_F^2, rho_i = `ridge_of` lambda_A times mean(diag M_i
    M_i^T).

    With S_i = M_i M_i^T + rho_i I = L_i L_i^T:  Q_i = L_i^{-1} M_i,  A_i = X_i Q_i^T L_i^{-1}. The explicit inverse
    of L_i turns both solves into matrix products, which are faster than batched triangular solves. The Gram matrix
    squares the condition number of M_i; where that loses Q_i its orthonormality (few atoms, or an activation that
    flattens), a Householder QR of [M_i, sqrt(rho_i) I] solves the same problem, and the expert is counted. A zero M_i
    gets zero adapters. Raises FitError on non-finite numbers.
    """
    S = M @ M.mT
    size = _mean_diagonal(S)
    rho = ridge_of(lambda_A, M.dtype) * torch.where(size > 0, size, torch.ones_like(size))
    eye = torch.eye(M.shape[1], dtype=M.dtype, device=M.device)
    factor, info = torch.linalg.cholesky_ex(S + rho[:, None, None] * eye)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    Q = inverse @ M
    A = (X @ Q.mT) @ inverse
    # the columns' squared norms are the diagonal of S_i^{-1}
    condition = size * inverse.square().sum(dim=1).amax(dim=1)
    trusted = (info == 0) & (condition * torch.finfo(M.dtype).eps < _TRUSTED)
    poor = torch.nonzero(~trusted & (size > 0))[:, 0]
    if len(poor):
        A[poor], Q[poor] = _by_qr(X[poor], M[poor], rho[poor])
    return Refit(A, Q, len(poor))


def _by_qr(
    X: Float[Tensor, "n p d"], M: Float[Tensor, "n r d"], rho: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "n p r"], Float[Tensor, "n r d"]]:
    """Return A_i and Q_i from [M_i, sqrt(rho_i) I]^T = [Q_i, ...]^T R_i, which does not square the condition number."""
    ridge = torch.diag_embed(rho.sqrt()[:, None].expand(M.shape[:2]))
    columns, R = torch.linalg.qr(torch.cat([M, ridge], dim=2).mT)
    Q = columns[:, : M.shape[2]].mT.contiguous()
    return torch.linalg.solve_triangular(R.mT, X @ Q.mT, upper=False, left=False), Q


def damped_cholesky(S: Float[Tensor, "n r r"], *, ridge: float) -> Float[Tensor, "n r r"]:
    """Return the lower Cholesky factors of S_i + ridge_i mean(diag S_i) I.

    ridge_i starts at `ridge` and grows tenfold for those that fail, until they factor; a matrix of zeros counts as the
    identity. Raises FitError when S is not finite.
    """
    size = _mean_diagonal(S)
    scale = torch.where(size > 0, size, torch.ones_like(size))
    eye = torch.eye(S.shape[1], dtype=S.dtype, device=S.device)

    def factored(which: Int[Tensor, " s"] | slice, ridge: float) -> tuple[Tensor, Tensor]:
        return torch.linalg.cholesky_ex(S[which] + (ridge * scale[which])[:, None, None] * eye)

    factor, info = factored(slice(None), ridge)
    failed = torch.nonzero(info)[:, 0]
    while len(failed):
        ridge *= 10
        factor[failed], info = factored(failed, ridge)
        failed = failed[torch.nonzero(info)[:, 0]]
    return factor


def _mean_diagonal(S: Float[Tensor, "n r r"]) -> Float[Tensor, " n"]:
    if not bool(torch.isfinite(S).all()):
        raise FitError(
            "the fit is no longer finite: check the weights for NaN, raise train.damping or use dtype=float64"
        )
    return S.diagonal(dim1=1, dim2=2).mean(dim=1)
