"""The projected Gauss-Newton step: a direction for the bank (and the codes) with the adapters eliminated.

Variable projection in Kaufman's form (Golub and Pereyra 1973; Kaufman 1975): the adapters follow every move, so the
part of a move inside the row space of M_i costs nothing and is projected out. The direction solves, approximately,

    min over d   sum_i || R_i - A_i (J_i * dY_i(d)) (I - Q_i^T Q_i) ||_F^2 + damping ||d||^2

by a few preconditioned conjugate-gradient iterations on the normal equations (Levenberg-Marquardt, inexact).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.chunks import expert_chunks
from globe.am.objective import Point
from globe.am.preconditioner import precondition
from globe.am.tangent import Move, Tangent


def gauss_newton_direction(
    tangent: Tangent,
    point: Point,
    *,
    cg_iterations: int,
    damping: float,
    generator: torch.Generator,
    lambda_B: float = 0.0,
    force: Float[Tensor, "n r d"] | None = None,
) -> Move:
    """The move that `cg_iterations` of conjugate gradients give, in plain atoms (and codes).

    damping    of Levenberg and Marquardt, relative to the mean diagonal of the preconditioner's blocks
    lambda_B   relative ridge on the bank itself (not on its change), in the same units
    force      stands in for `point.force`, when the target is blended

    A zero gradient gives a zero move.
    """
    solver = precondition(tangent, point, damping=damping, generator=generator)
    residual = _adjoint(tangent, point.force if force is None else force)
    ridge = [0.0] * len(residual)
    if lambda_B > 0:
        ridge[0] = lambda_B / damping * solver.damping[0]
        bank = tangent.bank if tangent.left is None else tangent.left
        if tangent.triangle is not None:
            bank = (tangent.triangle @ bank.flatten(1)).view_as(bank)
        residual = (residual[0] - ridge[0] * bank, *residual[1:])
    shift = [a + b for a, b in zip(solver.damping, ridge, strict=True)]
    step: Move = tuple(torch.zeros_like(part) for part in residual)
    solved = solver.apply(residual)
    search: Move = tuple(part.clone() for part in solved)
    energy = first = _dot(residual, solved)
    for _ in range(cg_iterations):
        if not energy > 1e-14 * first:
            break
        curved = _curvature(tangent, point, search, shift)
        length = energy / _dot(search, curved)
        for s, q, g, c in zip(step, search, residual, curved, strict=True):
            s.add_(q, alpha=length)
            g.sub_(c, alpha=length)
        solved = solver.apply(residual)
        energy, before = _dot(residual, solved), energy
        for q, z in zip(search, solved, strict=True):
            q.mul_(energy / before).add_(z)
    return tangent.leave_coordinates(step)


def _dot(a: Move, b: Move) -> float:
    return float(sum(torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)))


def _adjoint(tangent: Tangent, force: Float[Tensor, "n r d"]) -> Move:
    n, r, d = force.shape
    m = tangent.bank.shape[0]
    atoms, codes = force.new_zeros(m, r * d), force.new_empty(n, m)
    for part in expert_chunks(n, r, d):
        tangent.adjoint_(force[part], part, atoms, codes)
    return tangent.gather(atoms, codes)


def _curvature(tangent: Tangent, point: Point, move: Move, shift: list[float]) -> Move:
    """H move with H = sum_i (dY_i)^T [J G_i (.) (I - P_i) J] dY_i + shift: one conjugate-gradient product."""
    m, r, d = tangent.bank.shape
    n = len(point.gram)
    change = tangent.atoms(move)
    atoms, codes = change.new_zeros(m, r * d), change.new_empty(n, m)
    for part in expert_chunks(n, r, d):
        D = tangent.forward(change, move, part)
        if point.slope is not None:
            D *= point.slope[part]
        Q = point.rows[part]
        D = torch.bmm(point.gram[part], torch.baddbmm(D, D @ Q.mT, Q, alpha=-1))
        if point.slope is not None:
            D *= point.slope[part]
        tangent.adjoint_(D, part, atoms, codes)
    result = tangent.gather(atoms, codes)
    return tuple(h.add_(q, alpha=c) for h, q, c in zip(result, move, shift, strict=True))
