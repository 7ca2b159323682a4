"""Targets of the dictionary step: warm start, weight-aware, and the blend of both (beta)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.refit import damped_cholesky, ridge_of
from globe.am.warm_start import align


def weight_aware_targets(
    X: Float[Tensor, "n p d"], A: Float[Tensor, "n p r"], *, lambda_T: float = 0.0
) -> Float[Tensor, "n r d"]:
    """Return T_i = argmin_T ||X_i - A_i T||_F^2 + ridge ||T||_F^2 = (A_i^T A_i + ridge)^{-1} A_i^T X_i.

    The ridge is lambda_T mean(diag A_i^T A_i), and at least what the factorisation needs.
    """
    factor = damped_cholesky(A.mT @ A, ridge=ridge_of(lambda_T, A.dtype))
    return torch.cholesky_solve(A.mT @ X, factor)


def aligned_warm_start(warm: Float[Tensor, "n r d"], M: Float[Tensor, "n r d"]) -> Float[Tensor, "n r d"]:
    """Return the warm-start bases V_i^T in the gauge and at the size of the present M_i.

    The singular vectors of different experts are rotated against each other arbitrarily, so each is first turned
    by the orthogonal matrix that brings it closest to M_i, then scaled to ||M_i||_F.
    """
    size = torch.linalg.vector_norm(M, dim=(1, 2)) / torch.linalg.vector_norm(warm, dim=(1, 2))
    return align(warm, M) * size[:, None, None]


def blend(
    beta: float, weight_aware: Float[Tensor, "n r d"], warm: Float[Tensor, "n r d"] | None
) -> Float[Tensor, "n r d"]:
    """Return (1 - beta) warm + beta weight_aware; `warm` may be None when beta is 1."""
    if beta == 1.0:
        return weight_aware
    assert warm is not None
    return torch.lerp(warm, weight_aware, beta)
