"""The Gauss-Newton curvature, applied to moves: where nearly all of a fit's arithmetic happens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.dictionary.remainder import Remainder
from globe.am.dictionary.tangent import Tangent
from globe.am.objective import Point, release
from globe.am.records import Move
from globe.numerics.chunks import expert_chunks, product_chunk_size

_IN_CACHE = 1 << 20
"""Numbers of a few experts' mixed bases at once: 2 MB in bfloat16."""
_PIECE = 1 << 18


class Curvature:
    """H move, H = sum_i dY_i^T J [G_i (.) K_i] J dY_i, with G_i = A_i^T A_i and K_i = I - Q_i^T Q_i.

    In a metric K_i = L_i (I - Q_i^T Q_i) L_i^T, which comes as a matrix (`remainder`).

    Per expert and product 3 r^2 d + 3 m r d multiply-adds, r^2 d + r d^2 + 3 m r d in a metric, in `dtype`. Copies of
    the point are made in that dtype once; a product comes back in the dtype of the fit. Lower precision perturbs only
    the direction of an inexact step, whose gradient and whose acceptance stay exact. With `spend` the point's own
    tensors are released as they are copied.
    """

    def __init__(
        self,
        tangent: Tangent,
        point: Point,
        *,
        dtype: torch.dtype,
        kept: Remainder | None = None,
        spend: bool = False,
    ) -> None:
        self._tangent = tangent
        self._dtype = dtype
        self._coordinates = tangent.coordinates.to(dtype)
        self._gram = _copy(point.gram, dtype, spend)
        self._kept = None if kept is None else kept.own
        self._rows = point.rows
        if kept is None:
            self._rows = _copy(point.rows, dtype, spend)
        elif spend:
            release(point.rows)
        self._slope = None if point.slope is None else _copy(point.slope, dtype, spend)
        bank = tangent.bank
        m, r, d = bank.shape
        n = len(point.gram)
        size = product_chunk_size(n, r, d, m, itemsize=dtype.itemsize)
        self._chunks = list(expert_chunks(n, r, d, size=size))
        # dB stands above B, so that one product makes both parts of dY
        self._stack = bank.new_empty((2 if tangent.joint else 1) * m, r * d, dtype=dtype)
        if tangent.joint:
            self._stack[m:] = bank.flatten(1)
        self._weights = torch.cat([self._coordinates] * (2 if tangent.joint else 1), dim=1)
        self._low = tangent
        self._factors = None
        if tangent.left is not None and tangent.right is not None:
            left, right = tangent.left.to(dtype), tangent.right.to(dtype)
            self._low = tangent._replace(left=left, right=right)
            # dU V + U dV as one product: [dU U] [V; dV]
            self._factors = torch.cat([left, left], dim=2), torch.cat([right, right], dim=1)
        # memory that is used again: fresh pages for every product cost as much as the product
        widest = max(part.stop - part.start for part in self._chunks)
        self._change = self._stack.new_empty(2, widest, r, d)
        # in low precision several chunks are summed in the dtype of the fit
        summed = dtype if len(self._chunks) == 1 else bank.dtype
        self._atoms, self._codes = bank.new_empty(m, r * d, dtype=summed), bank.new_empty(n, m)
        self._product = self._stack.new_empty(m, r * d) if summed != dtype else None

    def product(self, move: Move) -> Move:
        """Return H move, without damping. The next product overwrites the result."""
        m, r, d = self._tangent.bank.shape
        self._atoms_of(move)
        if self._tangent.joint:
            self._weights[:, m:] = move[-1]
        for part in self._chunks:
            change, pulled = (buffer[: part.stop - part.start] for buffer in self._change)
            torch.mm(self._weights[part], self._stack, out=change.flatten(1))
            for few in _few_experts(len(change), r * d):
                own = slice(part.start + few.start, part.start + few.stop)
                self._pull(change[few], pulled[few], own)
            self._adjoint(pulled.flatten(1), part)
        return self._gather(self._atoms.view(m, r, d))

    def _pull(self, change: Float[Tensor, "c r d"], pulled: Float[Tensor, "c r d"], own: slice) -> None:
        """Add J [G (.) K] J of a change of a few experts' mixed bases, into `pulled`; spends `change`."""
        if self._kept is not None:
            self._pull_in_metric(change, pulled, own, self._kept[own])
            return
        Q = self._rows[own]
        if self._slope is None:
            change.baddbmm_(change @ Q.mT, Q, alpha=-1)
            torch.bmm(self._gram[own], change, out=pulled)
            return
        # not in place: into the other buffer takes two thirds of the time
        torch.mul(change, self._slope[own], out=pulled)
        pulled.baddbmm_(pulled @ Q.mT, Q, alpha=-1)
        torch.bmm(self._gram[own], pulled, out=change)
        torch.mul(change, self._slope[own], out=pulled)

    def _pull_in_metric(
        self,
        change: Float[Tensor, "c r d"],
        pulled: Float[Tensor, "c r d"],
        own: slice,
        K: Float[Tensor, "c d d"],
    ) -> None:
        if self._slope is None:
            torch.bmm(change, K, out=pulled)
            pulled.copy_(torch.bmm(self._gram[own], pulled, out=change))
            return
        torch.mul(change, self._slope[own], out=pulled)
        torch.bmm(pulled, K, out=change)
        torch.bmm(self._gram[own], change, out=pulled)
        pulled.mul_(self._slope[own])

    def adjoint(self, force: Float[Tensor, "n r d"]) -> Move:
        """Return dY^T force, the inner products of a force on every mixed basis with the moves, in its dtype."""
        n, r, d = force.shape
        bank = self._tangent.bank
        atoms, codes = force.new_zeros(len(bank), r * d), force.new_empty(n, len(bank))
        for part in expert_chunks(n, r, d):
            flat = force[part].flatten(1)
            atoms.addmm_(self._tangent.coordinates[part].T, flat)
            torch.mm(flat, bank.flatten(1).T, out=codes[part])
        return self._tangent.gather(atoms.unflatten(1, (r, d)), codes)

    def _atoms_of(self, move: Move) -> None:
        """Write the move's change of the atoms into the stack."""
        m, r, d = self._tangent.bank.shape
        if self._factors is None:
            self._stack[:m] = move[0].flatten(1)
            return
        left, right = self._factors
        k = move[0].shape[2]
        left[:, :, :k], right[:, k:] = move[0], move[1]
        torch.bmm(left, right, out=self._stack[:m].view(m, r, d))

    def _gather(self, atoms: Float[Tensor, "m r d"]) -> Move:
        """Return the product as a move in the dtype of the fit, by the factors that are at hand in that of `atoms`."""
        tangent = self._low if atoms.dtype == self._dtype else self._tangent
        own = tuple(part.to(self._tangent.bank.dtype) for part in tangent.pulled(atoms))
        return self._tangent.summed(own, self._codes)

    def _adjoint(self, flat: Float[Tensor, "c rd"], part: slice) -> None:
        """Add one chunk to the inner products with the atoms, and write its rows of those with the codes."""
        weights = self._coordinates[part].T
        if self._product is not None:
            torch.mm(weights, flat, out=self._product)
            self._atoms.copy_(self._product) if part.start == 0 else _add(self._atoms, self._product)
        elif part.start == 0:
            torch.mm(weights, flat, out=self._atoms)
        else:
            self._atoms.addmm_(weights, flat)
        if self._tangent.joint:
            self._codes[part] = flat @ self._stack[len(self._atoms) :].T


def _few_experts(count: int, numbers: int) -> Iterator[slice]:
    """Yield parts of a chunk, two experts at least, whose r d `numbers` each stay in the cache between products.

    Batches of one would have their transposed factor copied.
    """
    parts = max(1, count // max(2, _IN_CACHE // numbers))
    for at in range(parts):
        yield slice(at * count // parts, (at + 1) * count // parts)


def _add(total: Float[Tensor, "m s"], part: Float[Tensor, "m s"]) -> None:
    """Add `part` of a lower precision to `total`, widened in pieces, since adding across precisions is slow."""
    total, part = total.view(-1), part.view(-1)
    for start in range(0, len(part), _PIECE):
        total[start : start + _PIECE] += part[start : start + _PIECE].to(total.dtype)


def _copy(tensor: Tensor, dtype: torch.dtype, spend: bool) -> Tensor:
    """Return the tensor in `dtype`, itself if it has that already."""
    copied = tensor.to(dtype)
    if spend and copied is not tensor:
        release(tensor)
    return copied
