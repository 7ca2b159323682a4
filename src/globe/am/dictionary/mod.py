"""The method of optimal directions (MOD; Engan, Aase, Husoy 1999): least-squares atoms for given targets and codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.refit import damped_cholesky, ridge_of


class Gauge(NamedTuple):
    """A bank with atoms of equal norm, and the codes that keep every mixed basis what it was."""

    bank: Float[Tensor, "m r d"]
    codes: Float[Tensor, "n m"]


def mod_step(
    targets: Float[Tensor, "n r d"],
    codes: Float[Tensor, "n m"],
    bank: Float[Tensor, "m r d"],
    *,
    lambda_B: float = 0.0,
) -> Float[Tensor, "m r d"]:
    """Return B = argmin sum_i ||T_i - sum_j alpha_ij B_j||_F^2 + ridge ||B - bank||_F^2, targets T for Y.

    (alpha^T alpha + ridge) (B - bank) = alpha^T (T - alpha bank), so that an atom nobody uses stays where it is.
    Exact for the true objective only when all adapters have orthonormal columns: it drops A_i^T A_i otherwise, and is
    then not monotone.
    """
    factor = damped_cholesky((codes.T @ codes)[None], ridge=ridge_of(lambda_B, bank.dtype))
    gap = targets.flatten(1) - codes @ bank.flatten(1)
    return bank + torch.cholesky_solve(codes.T @ gap, factor[0]).unflatten(1, bank.shape[1:])


def linearised_targets(
    Y: Float[Tensor, "n r d"],
    M: Float[Tensor, "n r d"],
    slope: Float[Tensor, "n r d"] | None,
    targets: Float[Tensor, "n r d"],
    *,
    floor: float = 0.1,
) -> Float[Tensor, "n r d"]:
    """Return targets for Y from targets T for M = phi(Y): Y + J (T - M) / (J^2 + floor^2), entrywise.

    The damped inverse keeps entries where phi is flat (J near 0) from running away; T itself when phi is linear.
    """
    if slope is None:
        return targets
    return Y + slope * (targets - M) / (slope * slope + floor * floor)


def rescale_gauge(bank: Float[Tensor, "m r d"], codes: Float[Tensor, "n m"]) -> Gauge:
    """Bring all atoms to the root mean square norm of the bank; the codes take up the rest, so that Y_i is unchanged.

    Zero atoms stay zero.
    """
    norms = torch.linalg.vector_norm(bank, dim=(1, 2))
    common = torch.sqrt((norms * norms).mean())
    factor = torch.where(
        norms > 0, norms / common.clamp_min(torch.finfo(bank.dtype).tiny), torch.ones_like(norms)
    )
    return Gauge(bank / factor[:, None, None], codes * factor)
