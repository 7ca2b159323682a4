"""Truncated SVD of every expert: the best approximation of rank r without sharing (Eckart, Young 1936)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors
from globe.am.warm_start import truncated_svd


def svd(X: Float[Tensor, "n p d"], *, r: int) -> Factors:
    """Minimise sum_i ||X_i - A_i B_i||^2 with rank r each: A_i = U S, B_i = V^T, so m = n and codes = I.

    1 <= r <= min(p, d); at r = min(p, d) the experts come back up to rounding.
    """
    start = truncated_svd(X, r)
    return Factors(start.bases, torch.eye(X.shape[0]).to(X), start.adapters)
