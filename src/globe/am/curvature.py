"""The Gauss-Newton curvature, applied to moves: where nearly all of a fit's arithmetic happens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.chunks import expert_chunks
from globe.am.objective import Point
from globe.am.tangent import Move, Tangent


class Curvature:
    """H move, H = sum_i dY_i^T J [G_i (.) (I - P_i)] J dY_i, with G_i = A_i^T A_i and P_i = Q_i^T Q_i.

    Per expert and product 3 r^2 d + 3 m r d multiply-adds, in `dtype`. Copies of the point are made in that dtype once;
    results and the sum over experts are in the dtype of the fit. Lower precision perturbs only the direction of an
    inexact step, whose gradient and whose acceptance stay exact.
    """

    def __init__(self, tangent: Tangent, point: Point, *, dtype: torch.dtype) -> None:
        self._tangent = tangent
        self._dtype = dtype
        self._coordinates = tangent.coordinates.to(dtype)
        self._gram = point.gram.to(dtype)
        self._rows = point.rows.to(dtype)
        self._slope = None if point.slope is None else point.slope.to(dtype)
        m, r, d = tangent.bank.shape
        n = len(point.gram)
        # every chunk adds to all m atoms, which pays only if it holds as many experts
        self._chunks = list(expert_chunks(n, r, d, least=max(4, m)))
        # dB stands above B, so that one product makes both parts of dY
        self._stack = tangent.bank.new_empty((2 if tangent.joint else 1) * m, r * d, dtype=dtype)
        if tangent.joint:
            self._stack[m:] = tangent.bank.flatten(1)
        # memory that is used again: fresh pages for every product cost as much as the product
        widest = max(part.stop - part.start for part in self._chunks)
        self._change = self._stack.new_empty(2, widest, r, d)
        self._atoms, self._codes = tangent.bank.new_empty(m, r * d), tangent.bank.new_empty(n, m)

    def product(self, move: Move) -> Move:
        """H move, without damping. The result is overwritten by the next product."""
        m, r, d = self._tangent.bank.shape
        self._stack[:m] = self._tangent.atoms(move).flatten(1)
        weights = self._coordinates
        if self._tangent.joint:
            weights = torch.cat([weights, move[-1].to(self._dtype)], dim=1)
        for part in self._chunks:
            change, pulled = (buffer[: part.stop - part.start] for buffer in self._change)
            torch.mm(weights[part], self._stack, out=change.flatten(1))
            if self._slope is not None:
                change *= self._slope[part]
            Q = self._rows[part]
            change.baddbmm_(change @ Q.mT, Q, alpha=-1)
            torch.bmm(self._gram[part], change, out=pulled)
            if self._slope is not None:
                pulled *= self._slope[part]
            self._adjoint(pulled.flatten(1), part)
        return self._tangent.gather(self._atoms.unflatten(1, (r, d)), self._codes)

    def adjoint(self, force: Float[Tensor, "n r d"]) -> Move:
        """dY^T force: the inner products of a force on every mixed basis with the moves, in the force's dtype."""
        n, r, d = force.shape
        bank = self._tangent.bank
        atoms, codes = force.new_zeros(len(bank), r * d), force.new_empty(n, len(bank))
        for part in expert_chunks(n, r, d):
            flat = force[part].flatten(1)
            atoms.addmm_(self._tangent.coordinates[part].T, flat)
            torch.mm(flat, bank.flatten(1).T, out=codes[part])
        return self._tangent.gather(atoms.unflatten(1, (r, d)), codes)

    def _adjoint(self, flat: Float[Tensor, "c rd"], part: slice) -> None:
        """Adds one chunk to the inner products with the atoms, and makes its rows of those with the codes."""
        weights = self._coordinates[part].T
        if part.start == 0 and self._dtype == self._atoms.dtype:
            torch.mm(weights, flat, out=self._atoms)
        elif part.start == 0:
            self._atoms.copy_(weights @ flat)
        elif self._dtype == self._atoms.dtype:
            self._atoms.addmm_(weights, flat)
        else:
            self._atoms += weights @ flat
        if self._tangent.joint:
            self._codes[part] = flat @ self._stack[len(self._atoms) :].T
