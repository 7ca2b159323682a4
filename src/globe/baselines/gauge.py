"""Gauge fixing: U V = (U T^-1)(T V) for any invertible T, so k x k numbers of an atom can be an identity."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.numerics.precision import to_float64


def pivot_rows(U: Float[Tensor, "m r k"]) -> Int[Tensor, "m k"]:
    """Return k rows of every U_j, chosen one by one as the row farthest from the span of those before it.

    That is QR with column pivoting of U_j^T (Businger, Golub 1965), which keeps the chosen k x k block well
    conditioned and the entries of U_j T^-1 moderate. Ties go to the lowest row.
    """
    m, _, k = U.shape
    rest = to_float64(U).clone()
    chosen = torch.empty(m, k, dtype=torch.long, device=U.device)
    atom = torch.arange(m, device=U.device)
    taken = torch.zeros(U.shape[:2], dtype=torch.bool, device=U.device)
    for i in range(k):
        lengths = torch.linalg.vector_norm(rest, dim=2).masked_fill(taken, -1.0)
        row = lengths.argmax(1)
        chosen[:, i] = row
        taken[atom, row] = True
        direction = torch.nn.functional.normalize(rest[atom, row], dim=1)[:, :, None]
        rest -= (rest @ direction) @ direction.mT
    return chosen


def gauge_fix(
    U: Float[Tensor, "m r k"], V: Float[Tensor, "m k d"]
) -> tuple[Float[Tensor, "m r k"], Float[Tensor, "m k d"]]:
    """Return (U', V') with U'_j V'_j = U_j V_j and k rows of U'_j an exact identity: k (r + d - k) free numbers.

    With T the pivot block of U_j: U' = U T^-1, V' = T V, in float64. A U_j of rank below k is no exception:
    its pivot rows span its row space, so U T^+ T = U still holds with the pseudo-inverse.
    """
    rows = pivot_rows(U)
    k = U.shape[2]
    atom = torch.arange(U.shape[0], device=U.device)[:, None]
    T = to_float64(U)[atom, rows]
    fixed = to_float64(U) @ torch.linalg.pinv(T, rtol=1e-12)
    fixed[atom, rows] = torch.eye(k, dtype=fixed.dtype, device=fixed.device)
    return fixed.to(U.dtype), (T @ to_float64(V)).to(V.dtype)
