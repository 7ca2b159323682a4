"""Block-Jacobi preconditioner of the projected Gauss-Newton system: one block per atom, one per expert's codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.dictionary.remainder import Remainder
from globe.am.dictionary.tangent import Tangent
from globe.am.objective import Point
from globe.am.records import Move
from globe.am.refit import damped_cholesky
from globe.numerics.chunks import expert_chunks
from globe.numerics.group import ProcessGroup

_SKETCH = 4
"""Random directions that stand for the d columns in the codes' blocks, beside the r rows of an atom: 4 do as well
as 24."""
_SMALL = 1e-2
"""Relative ridge of the small blocks (k x k of low-rank atoms), which only steer the search."""
_COUPLED_RIDGE = 1e-3
"""Relative ridge of the coupled blocks: 1e-2 to 1e-4 do alike."""
_MOST_COUPLED = 8192
"""Rows of coupled blocks, whose inverse takes their cube: as much as one product with the curvature at real sizes."""
_FLAT = 0.1
"""Curvature left to directions inside every expert's row space, where the true one is zero: 0.03 to 0.3 do alike."""


class Preconditioner(NamedTuple):
    """Explicit inverses of the blocks, and the Levenberg-Marquardt damping in the units of each block.

    The inverses may be in a lower precision than the moves, which come back in their own.
    """

    bank: Float[Tensor, "m r r"] | None
    left: tuple[Tensor, Tensor] | None
    """(m, r, r) and (m, k, k) atom by atom, or (r, r) and (m k, m k) coupled"""
    right: Tensor | None
    """(m, k, k) atom by atom, or (m k, m k) coupled"""
    codes: Float[Tensor, "n m m"] | None
    columns: Float[Tensor, "d d"]
    damping: tuple[float, ...]

    def apply(self, move: Move) -> Move:
        dtype, before = self.columns.dtype, move[0].dtype
        if dtype == before:
            return self._apply(move)
        return tuple(part.to(before) for part in self._apply(tuple(part.to(dtype) for part in move)))

    def to(self, dtype: torch.dtype) -> Preconditioner:
        left = None if self.left is None else (self.left[0].to(dtype), self.left[1].to(dtype))
        bank, right, codes = (
            None if part is None else part.to(dtype) for part in (self.bank, self.right, self.codes)
        )
        return Preconditioner(bank, left, right, codes, self.columns.to(dtype), self.damping)

    def _apply(self, move: Move) -> Move:
        solved: Move
        if self.left is None or self.right is None:
            assert self.bank is not None
            solved = (self.bank @ move[0] @ self.columns,)
        elif self.right.dim() == 2:
            solved = self._coupled(*move[:2])
        else:
            solved = (self.left[0] @ move[0] @ self.left[1], self.right @ move[1] @ self.columns)
        if self.codes is None:
            return solved
        return (*solved, torch.bmm(self.codes, move[-1].unsqueeze(2)).squeeze(2))

    def _coupled(self, left: Float[Tensor, "m r k"], right: Float[Tensor, "m k d"]) -> Move:
        assert self.left is not None
        assert self.right is not None
        m, r, k = left.shape
        # (r, m k): all atoms beside each other
        side = left.transpose(0, 1).reshape(r, m * k)
        solved = (self.left[0] @ side @ self.left[1]).view(r, m, k).transpose(0, 1).contiguous()
        return solved, (self.right @ (right.flatten(0, 1) @ self.columns)).view_as(right)


def precondition(
    tangent: Tangent,
    point: Point,
    *,
    damping: float,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
    kept: Remainder | None = None,
) -> Preconditioner:
    """Return the blocks at one point; `damping` is relative to each block's mean diagonal.

    Bank: P_j (x) C with P_j = sum_i c_ij^2 mean(J_i^2) A_i^T A_i over an atom's rows and C = mean_i (I - Q_i^T Q_i)
    over its columns, multiplied in `dtype`; C saves a fifth of the steps. In a metric C is the mean of
    `kept`. Low-rank atoms: see `_low_rank_blocks`.
    Codes: the m x m Gram of the atoms in expert i's projected metric, from a random sketch of the columns. Dense
    inverses, since multiplying by them is twice as fast as solving here. All processes get process 0's blocks of
    the atoms.
    """
    weights, group = point.gram, tangent.group
    if point.slope is not None:
        weights = weights * _mean_squares(point.slope)[:, None, None]
    m, r = tangent.bank.shape[:2]
    blocks = group.sum((tangent.coordinates**2).T @ weights.flatten(1)).view(m, r, r)
    typical = float(blocks.diagonal(dim1=1, dim2=2).mean())
    bank = left = right = codes = None
    if kept is None or point.metric is None:
        metric = _column_metric(point.rows, group, dtype)
    else:
        metric = kept.mean + _FLAT * point.metric.mean
    columns = group.same(_inverse(metric[None], absolute=0.0)[0])
    if tangent.left is None or tangent.right is None:
        bank = group.same(_inverse(blocks, absolute=damping * typical))
        scales: tuple[float, ...] = (damping * typical,)
    else:
        left, right, scales = _low_rank_blocks(tangent, weights, blocks, metric, damping)
        left, right = (group.same(left[0]), group.same(left[1])), group.same(right)
    if tangent.joint:
        gram = _code_blocks(tangent, point, weights, generator)
        ridge = damping * float(group.average(gram.diagonal(dim1=1, dim2=2).mean()))
        own = 1e-3 * gram.diagonal(dim1=1, dim2=2).mean(dim=1)
        if tangent.free is not None:
            # fixed codes must not enter a free one's solution: the search would leave the feasible moves
            gram = gram * tangent.free[:, :, None] * tangent.free[:, None, :]
        eye = torch.eye(m, dtype=gram.dtype, device=gram.device)
        codes = _inverse(gram + (own + ridge)[:, None, None] * eye, absolute=0.0)
        scales = (*scales, ridge)
    return Preconditioner(bank, left, right, codes, columns, scales)


def _mean_squares(slope: Float[Tensor, "n r d"]) -> Float[Tensor, " n"]:
    return torch.cat([(slope[part] * slope[part]).mean(dim=(1, 2)) for part in expert_chunks(*slope.shape)])


def _low_rank_blocks(
    tangent: Tangent,
    weights: Float[Tensor, "n r r"],
    blocks: Float[Tensor, "m r r"],
    metric: Float[Tensor, "d d"],
    damping: float,
) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[float, float]]:
    """Return the inverses for U and for V, and their dampings.

    Atoms that many experts share pull on each other: atom by atom, P_j (x) V_j C V_j^T and U_j^T P_j U_j (x) C, the
    system keeps a condition number of 70 for U and 900 for V (60 trained experts, k = 17). So the blocks are coupled
    through S = sum_i g_i alpha_i alpha_i^T, g_i the mean diagonal of expert i's weights and G their mean:

        U:  G (x) K,  K_(jl) = S_jl V_j C V_l^T           V:  K (x) C,  K_(jl) = S_jl U_j^T G U_l

    the second scaled to the diagonal of its own atoms' blocks. Beyond m k = 8192 they stay apart.
    """
    U, V = tangent.left, tangent.right
    assert U is not None
    assert V is not None
    m, r, k = U.shape
    outer = V @ metric @ V.mT
    # from a factor, since U^T P U loses its sign to rounding where P is large off the columns of U
    root = damped_cholesky(blocks, ridge=_smallest_ridge(blocks))
    across = root.mT @ U
    inner = across.mT @ across
    typical, outer_typical, inner_typical = (
        float(part.diagonal(dim1=1, dim2=2).mean()) for part in (blocks, outer, inner)
    )
    scales = (damping * typical * outer_typical, damping * inner_typical)
    if m * k > _MOST_COUPLED:
        left = _inverse(blocks, absolute=damping * typical), _inverse(outer, absolute=_SMALL * outer_typical)
        return left, _inverse(inner, absolute=_SMALL * inner_typical), scales
    size = weights.diagonal(dim1=1, dim2=2).mean(dim=1)
    shared = tangent.group.sum((tangent.coordinates * size[:, None]).T @ tangent.coordinates)
    # all of them are zero where the experts are, after centring
    shared = shared / tangent.group.average(size.mean()).clamp_min(torch.finfo(size.dtype).tiny)
    shared = shared.repeat_interleave(k, dim=0).repeat_interleave(k, dim=1)
    mean = tangent.group.average(weights.mean(dim=0, keepdim=True))
    rows = V.flatten(0, 1)
    across_rows = _inverse_coupled(shared * (rows @ metric @ rows.T))
    root = damped_cholesky(mean, ridge=_smallest_ridge(mean))
    side = root[0].T @ U.transpose(0, 1).reshape(r, m * k)
    coupling = shared * (side.T @ side)
    own = inner.diagonal(dim1=1, dim2=2).flatten()
    scale = (own / coupling.diagonal().clamp_min(torch.finfo(own.dtype).tiny)).sqrt()
    coupling = scale[:, None] * coupling * scale
    left = _inverse(mean, absolute=damping * float(mean[0].diagonal().mean()))[0], across_rows
    return left, _inverse_coupled(coupling), scales


def _inverse_coupled(K: Float[Tensor, "s s"]) -> Float[Tensor, "s s"]:
    return _inverse(K[None], absolute=_COUPLED_RIDGE * float(K.diagonal().mean()))[0]


def _column_metric(
    rows: Float[Tensor, "n r d"], group: ProcessGroup, dtype: torch.dtype | None
) -> Float[Tensor, "d d"]:
    """Return (1 + flat) I - mean_i Q_i^T Q_i: the share of each input direction that the adapters cannot absorb."""
    flat = rows.flatten(0, 1).to(dtype)
    metric = group.sum((flat.T @ flat).to(rows.dtype)) / -group.count(len(rows))
    metric.diagonal().add_(1 + _FLAT)
    return metric


def _inverse(blocks: Float[Tensor, "b s s"], *, absolute: float) -> Float[Tensor, "b s s"]:
    eye = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    factor = damped_cholesky(blocks + absolute * eye, ridge=_smallest_ridge(blocks))
    return torch.cholesky_inverse(factor)


def _smallest_ridge(blocks: Float[Tensor, "b s s"]) -> float:
    return 1e-6 if blocks.dtype == torch.float32 else 1e-12


def _code_blocks(
    tangent: Tangent, point: Point, weights: Float[Tensor, "n r r"], generator: torch.Generator
) -> Float[Tensor, "n m m"]:
    """Return K_i[j, l] ~ <B_j L_i (I - P_i), G_i B_l L_i (I - P_i)> with the columns sketched: E[Omega Omega^T] = I."""
    bank = tangent.bank
    n, (m, r, d) = len(weights), bank.shape
    omega = torch.randn(d, _SKETCH, generator=generator, dtype=torch.float32).to(bank) / _SKETCH**0.5
    result = bank.new_empty(n, m, m)
    for part in expert_chunks(n, max(m * _SKETCH, r), r):
        rows = point.rows[part]
        sketch = omega - rows.mT @ (rows @ omega)
        if point.metric is not None:
            sketch = point.metric.of(part) @ sketch
        # one wide product instead of many narrow ones
        seen = bank.flatten(0, 1) @ sketch.transpose(0, 1).flatten(1)
        across = seen.view(m, r, -1, _SKETCH).permute(2, 1, 0, 3).flatten(2)
        weighted = (weights[part] @ across).unflatten(2, (m, _SKETCH)).transpose(1, 2).flatten(2)
        across = across.unflatten(2, (m, _SKETCH)).transpose(1, 2).flatten(2)
        torch.bmm(across, weighted.mT, out=result[part])
    return result
