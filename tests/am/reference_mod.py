"""The method of optimal directions, its targets and its norms, by LAPACK and SciPy."""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from reference import least_squares
from torch import Tensor


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
