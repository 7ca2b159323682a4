"""First order: how a move of bank and codes changes the mixed bases, Y_i = sum_j alpha_ij B_j.

    dY_i = sum_j alpha_ij dB_j + dalpha_ij B_j,      dB_j = dU_j V_j + U_j dV_j  when B_j = U_j V_j

A move is a tuple of tensors: (bank,) or (left, right), then (codes,) if the codes move too. Dense banks move in
*orthonormal code coordinates*: with codes = C R (QR), the move of R B is solved for, since sum_i C_ij C_il = 0 for
j != l removes most of the coupling between atoms that a block preconditioner cannot see.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from globe.am.records import Move
from globe.numerics.group import ALONE, ProcessGroup

_COLLINEAR = 1e-4
"""Below this ratio of R's diagonal the codes' columns count as dependent and are used as they are."""


class Tangent(NamedTuple):
    """The linear map at one point, with its adjoint."""

    bank: Float[Tensor, "m r d"]
    left: Float[Tensor, "m r k"] | None
    right: Float[Tensor, "m k d"] | None
    coordinates: Float[Tensor, "n m"]
    """C where the bank moves in orthonormal coordinates, else the codes themselves"""
    triangle: Float[Tensor, "m m"] | None
    """R of codes = C R; None where the coordinates are the codes"""
    free: Bool[Tensor, "n m"] | None
    """codes that may move; None is all"""
    joint: bool
    """whether the codes move"""
    group: ProcessGroup = ALONE
    """codes, and with them their part of a move, are those of the experts here; the rest is the same on all
    processes"""

    def gather(self, atoms: Float[Tensor, "m r d"], codes: Float[Tensor, "n m"]) -> Move:
        """Return the adjoint of dY as a move, from its products with the atoms (`coordinates`^T dY) and the codes."""
        return self.summed(self.pulled(atoms), codes)

    def pulled(self, atoms: Float[Tensor, "m r d"]) -> Move:
        """Turn inner products with the atoms into those with what moves: the bank, or its factors."""
        if self.left is None or self.right is None:
            return (atoms,)
        return atoms @ self.right.mT, self.left.mT @ atoms

    def summed(self, atoms: Move, codes: Float[Tensor, "n m"]) -> Move:
        """Return a move from such products of the experts here: its part in the atoms is summed over all processes."""
        move = tuple(self.group.sum(part) for part in atoms)
        if not self.joint:
            return move
        return (*move, codes if self.free is None else codes * self.free)

    def counted(self, move: Move) -> Move:
        """Return the parts of a move that this process adds to an inner product: the atoms count on process 0 alone."""
        if self.group.rank == 0:
            return move
        return move[-1:] if self.joint else ()

    def leave_coordinates(self, move: Move) -> Move:
        """Return a move with the bank's part back in the plain atoms, R dB = solved, and equal on all processes."""
        if self.triangle is not None:
            solved = torch.linalg.solve_triangular(self.triangle, move[0].flatten(1), upper=True)
            move = (solved.unflatten(1, self.bank.shape[1:]), *move[1:])
        codes = move[-1:] if self.joint else ()
        return (*(self.group.same(part) for part in move[: len(move) - len(codes)]), *codes)


def tangent(
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    *,
    left: Float[Tensor, "m r k"] | None = None,
    right: Float[Tensor, "m k d"] | None = None,
    free: Bool[Tensor, "n m"] | None = None,
    joint: bool = True,
    group: ProcessGroup = ALONE,
) -> Tangent:
    """Return the tangent at (bank, codes). Orthonormal coordinates need dense atoms and independent codes."""
    coordinates, triangle = codes, None
    if left is None and group.count(codes.shape[0]) >= codes.shape[1]:
        C, R = (group.same(part) for part in torch.linalg.qr(group.gather(codes)))
        diagonal = R.diagonal().abs()
        if bool(diagonal.min() > _COLLINEAR * diagonal.max()):
            coordinates, triangle = group.own(C), R
    return Tangent(bank, left, right, coordinates, triangle, free, joint, group)
