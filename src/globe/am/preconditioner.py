"""Block-Jacobi preconditioner of the projected Gauss-Newton system: one block per atom, one per expert's codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.chunks import expert_chunks
from globe.am.objective import Point
from globe.am.refit import damped_cholesky
from globe.am.tangent import Move, Tangent

_SKETCH = 24
"""Random directions that stand for the d columns in the codes' blocks."""
_SMALL = 1e-2
"""Relative ridge of the small blocks (k x k of low-rank atoms), which only steer the search."""
_FLAT = 0.1
"""Curvature left to directions inside every expert's row space, where the true one is zero: 0.03 to 0.3 do alike."""


class Preconditioner(NamedTuple):
    """Explicit inverses of the blocks, and the Levenberg-Marquardt damping in the units of each block."""

    bank: Float[Tensor, "m r r"] | None
    left: tuple[Float[Tensor, "m r r"], Float[Tensor, "m k k"]] | None
    right: Float[Tensor, "m k k"] | None
    codes: Float[Tensor, "n m m"] | None
    columns: Float[Tensor, "d d"]
    damping: tuple[float, ...]

    def apply(self, move: Move) -> Move:
        solved: Move
        if self.left is not None and self.right is not None:
            solved = (self.left[0] @ move[0] @ self.left[1], self.right @ move[1] @ self.columns)
        else:
            assert self.bank is not None
            solved = (self.bank @ move[0] @ self.columns,)
        if self.codes is None:
            return solved
        return (*solved, torch.bmm(self.codes, move[-1].unsqueeze(2)).squeeze(2))


def precondition(
    tangent: Tangent, point: Point, *, damping: float, generator: torch.Generator
) -> Preconditioner:
    """Blocks at one point; `damping` is relative to each block's mean diagonal.

    Bank: P_j (x) C with P_j = sum_i c_ij^2 mean(J_i^2) A_i^T A_i over an atom's rows and C = mean_i (I - Q_i^T Q_i)
    over its columns; C saves a fifth of the steps. Low-rank atoms: P_j (x) V C V^T and U^T P_j U (x) C. Codes: the
    m x m Gram of the atoms in expert i's projected metric, from a random sketch of the columns. Dense inverses, since
    multiplying by them is twice as fast as solving here.
    """
    weights = point.gram
    if point.slope is not None:
        weights = weights * (point.slope * point.slope).mean(dim=(1, 2))[:, None, None]
    m, r = tangent.bank.shape[:2]
    blocks = ((tangent.coordinates**2).T @ weights.flatten(1)).view(m, r, r)
    typical = float(blocks.diagonal(dim1=1, dim2=2).mean())
    bank = left = right = codes = None
    metric = _column_metric(point.rows)
    columns = _inverse(metric[None], absolute=0.0)[0]
    if tangent.left is None or tangent.right is None:
        bank = _inverse(blocks, absolute=damping * typical)
        scales: tuple[float, ...] = (damping * typical,)
    else:
        outer = tangent.right @ metric @ tangent.right.mT
        # from a factor, since U^T P U loses its sign to rounding where P is large off the columns of U
        root, _ = damped_cholesky(blocks, ridge=_smallest_ridge(blocks))
        across = root.mT @ tangent.left
        inner = across.mT @ across
        outer_typical = float(outer.diagonal(dim1=1, dim2=2).mean())
        inner_typical = float(inner.diagonal(dim1=1, dim2=2).mean())
        left = (
            _inverse(blocks, absolute=damping * typical),
            _inverse(outer, absolute=_SMALL * outer_typical),
        )
        right = _inverse(inner, absolute=_SMALL * inner_typical)
        scales = (damping * typical * outer_typical, damping * inner_typical)
    if tangent.joint:
        gram = _code_blocks(tangent, point, weights, generator)
        ridge = damping * float(gram.diagonal(dim1=1, dim2=2).mean())
        own = 1e-3 * gram.diagonal(dim1=1, dim2=2).mean(dim=1)
        if tangent.free is not None:
            # fixed codes must not enter a free one's solution: the search would leave the feasible moves
            gram = gram * tangent.free[:, :, None] * tangent.free[:, None, :]
        eye = torch.eye(m, dtype=gram.dtype, device=gram.device)
        codes = _inverse(gram + (own + ridge)[:, None, None] * eye, absolute=0.0)
        scales = (*scales, ridge)
    return Preconditioner(bank, left, right, codes, columns, scales)


def _column_metric(rows: Float[Tensor, "n r d"]) -> Float[Tensor, "d d"]:
    """(1 + flat) I - mean_i Q_i^T Q_i: the share of each input direction that the adapters cannot absorb."""
    flat = rows.flatten(0, 1)
    metric = flat.T @ flat / -len(rows)
    metric.diagonal().add_(1 + _FLAT)
    return metric


def _inverse(blocks: Float[Tensor, "b s s"], *, absolute: float) -> Float[Tensor, "b s s"]:
    eye = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    factor, _ = damped_cholesky(blocks + absolute * eye, ridge=_smallest_ridge(blocks))
    return torch.cholesky_inverse(factor)


def _smallest_ridge(blocks: Float[Tensor, "b s s"]) -> float:
    return 1e-6 if blocks.dtype == torch.float32 else 1e-12


def _code_blocks(
    tangent: Tangent, point: Point, weights: Float[Tensor, "n r r"], generator: torch.Generator
) -> Float[Tensor, "n m m"]:
    """K_i[j, l] ~ <B_j (I - P_i), G_i B_l (I - P_i)> with the columns sketched: E[Omega Omega^T] = I."""
    bank = tangent.bank
    n, (m, r, d) = len(weights), bank.shape
    omega = torch.randn(d, _SKETCH, generator=generator, dtype=torch.float32).to(bank) / _SKETCH**0.5
    result = bank.new_empty(n, m, m)
    for part in expert_chunks(n, m * r, _SKETCH):
        rows = point.rows[part]
        seen = bank.flatten(0, 1) @ (omega - rows.mT @ (rows @ omega))
        factor, _ = damped_cholesky(weights[part], ridge=1e-6)
        across = seen.unflatten(1, (m, r)).transpose(1, 2).flatten(2)
        weighted = (factor.mT @ across).unflatten(2, (m, _SKETCH)).transpose(1, 2).flatten(2)
        torch.bmm(weighted, weighted.mT, out=result[part])
    return result
