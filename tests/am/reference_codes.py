"""The normal equations of the codes entry by entry, their best non-negative codes by trying every set of atoms."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Bool, Float
from reference import ReferencePoint
from torch import Tensor


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
