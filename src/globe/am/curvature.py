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
        # dB stands above B, so that one product makes both parts of dY
        self._stack = tangent.bank.new_empty((2 if tangent.joint else 1) * m, r * d, dtype=dtype)
        if tangent.joint:
            self._stack[m:] = tangent.bank.flatten(1)

    def product(self, move: Move) -> Move:
        """H move, without damping."""
        m, r, d = self._tangent.bank.shape
        self._stack[:m] = self._tangent.atoms(move).flatten(1)
        weights = self._coordinates
        if self._tangent.joint:
            weights = torch.cat([weights, move[-1].to(self._dtype)], dim=1)
        atoms, codes = move[0].new_zeros(m, r * d), move[0].new_empty(len(weights), m)
        for part in expert_chunks(len(weights), r, d):
            change = (weights[part] @ self._stack).unflatten(1, (r, d))
            if self._slope is not None:
                change *= self._slope[part]
            Q = self._rows[part]
            change = torch.bmm(self._gram[part], torch.baddbmm(change, change @ Q.mT, Q, alpha=-1))
            if self._slope is not None:
                change *= self._slope[part]
            self._adjoint(change, part, atoms, codes)
        return self._tangent.gather(atoms.unflatten(1, (r, d)), codes)

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

    def _adjoint(
        self,
        change: Float[Tensor, "c r d"],
        part: slice,
        atoms: Float[Tensor, "m rd"],
        codes: Float[Tensor, "n m"],
    ) -> None:
        flat = change.flatten(1)
        if flat.dtype == atoms.dtype:
            atoms.addmm_(self._coordinates[part].T, flat)
        else:
            atoms += self._coordinates[part].T @ flat
        if self._tangent.joint:
            codes[part] = flat @ self._stack[len(atoms) :].T
