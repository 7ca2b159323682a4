"""One basis for all experts: Tucker-1 along the columns, which is also MoLAE's shared latent projection."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors
from globe.am.seeding import group_basis


def shared_basis(X: Float[Tensor, "n p d"], *, r: int) -> Factors:
    """Minimise sum_i ||X_i - A_i B||^2 over one B (r, d) and all A_i, exactly; m = 1 and codes are ones.

    The rows of B are the leading right singular vectors of all experts stacked, and A_i = X_i B^T
    (De Lathauwer, De Moor, Vandewalle 2000; MoLAE, arXiv 2503.23100). r may exceed p, up to min(n p, d).
    """
    B = group_basis(X, torch.ones(X.shape[0], dtype=torch.bool), r)
    return Factors(B[None], X.new_ones(X.shape[0], 1), X @ B.mT)
