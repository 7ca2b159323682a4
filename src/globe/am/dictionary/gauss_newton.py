"""The projected Gauss-Newton step: a direction for the bank (and the codes) with the adapters eliminated.

Variable projection in Kaufman's form (Golub and Pereyra 1973; Kaufman 1975): the adapters follow every move, so the
part of a move inside the row space of M_i costs nothing and is projected out. The direction solves, approximately,

    min over d   sum_i || R_i - A_i (J_i * dY_i(d)) L_i (I - Q_i^T Q_i) ||_F^2 + damping ||d||^2

by a few preconditioned conjugate-gradient iterations on the normal equations (Levenberg-Marquardt, inexact).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.dictionary.curvature import Curvature
from globe.am.dictionary.preconditioner import Preconditioner, precondition
from globe.am.dictionary.remainder import remainder
from globe.am.dictionary.tangent import Tangent
from globe.am.objective import Point, release
from globe.am.records import Move


class Direction(NamedTuple):
    """Where to go, and by how much the quadratic model says the objective falls on the way."""

    move: Move
    predicted: float


def gauss_newton_direction(
    tangent: Tangent,
    point: Point,
    *,
    cg_iterations: int,
    cg_tolerance: float = 0.0,
    damping: float,
    generator: torch.Generator,
    lambda_B: float = 0.0,
    force: Float[Tensor, "n r d"] | None = None,
    curvature_dtype: torch.dtype | None = None,
    spend: bool = False,
) -> Direction:
    """Return the move that at most `cg_iterations` of conjugate gradients give, in plain atoms (and codes).

    cg_tolerance     the truncation test of Nash and Sofer (1990): end after iteration j if the quadratic model fell by
                     no more than cg_tolerance / j of its whole fall so far; 0 makes all iterations
    damping          of Levenberg and Marquardt, relative to the mean diagonal of the preconditioner's blocks
    lambda_B         relative ridge on the bank itself (not on its change), in the same units
    force            stands in for `point.force`, when the target is blended
    curvature_dtype  of the products with the curvature; None is the dtype of the fit
    spend            the point's large tensors are released once they are of no more use here

    A zero gradient gives a zero move; so does a direction without positive curvature, at the iteration that finds it.
    """
    dtype = curvature_dtype or point.force.dtype
    kept = None if point.metric is None else remainder(point, tangent.group, dtype=dtype)
    solver = precondition(tangent, point, damping=damping, generator=generator, dtype=dtype, kept=kept)
    curvature = Curvature(tangent, point, dtype=dtype, kept=kept, spend=spend)
    solver = solver.to(dtype)
    residual = curvature.adjoint(point.force if force is None else force)
    if spend:
        release(point.force, point.adapters)
    shift = list(solver.damping)
    if lambda_B > 0:
        ridge = lambda_B / damping * solver.damping[0]
        bank = tangent.bank if tangent.left is None else tangent.left
        if tangent.triangle is not None:
            bank = (tangent.triangle @ bank.flatten(1)).view_as(bank)
        residual = (residual[0] - ridge * bank, *residual[1:])
        shift[0] += ridge
    step, predicted = _conjugate_gradients(
        tangent, curvature, solver, residual, shift, iterations=cg_iterations, tolerance=cg_tolerance
    )
    return Direction(tangent.leave_coordinates(step), predicted)


def _conjugate_gradients(
    tangent: Tangent,
    curvature: Curvature,
    solver: Preconditioner,
    residual: Move,
    shift: list[float],
    *,
    iterations: int,
    tolerance: float,
) -> tuple[Move, float]:
    """Solve (H + shift) step = residual; return the step and the fall of the quadratic model. Overwrites `residual`."""
    predicted = 0.0
    step: Move = tuple(torch.zeros_like(part) for part in residual)
    search = solver.apply(residual)
    energy = first = _dot(tangent, residual, search)
    rounding = torch.finfo(residual[0].dtype).eps ** 2
    for count in range(1, iterations + 1):
        if not energy > rounding * first:
            break
        curved = curvature.product(search)
        for part, along, weight in zip(curved, search, shift, strict=True):
            part.add_(along, alpha=weight)
        bend = _dot(tangent, search, curved)
        if not bend > 0:
            break
        gain = energy * energy / bend
        predicted += gain
        for at, along, left, part in zip(step, search, residual, curved, strict=True):
            at.add_(along, alpha=energy / bend)
            left.sub_(part, alpha=energy / bend)
        if count * gain <= tolerance * predicted:
            break
        solved = solver.apply(residual)
        energy, before = _dot(tangent, residual, solved), energy
        for along, part in zip(search, solved, strict=True):
            along.mul_(energy / before).add_(part)
        del solved, part  # as large as a bank
    return step, predicted


def _dot(tangent: Tangent, a: Move, b: Move) -> float:
    parts = zip(tangent.counted(a), tangent.counted(b), strict=True)
    return tangent.group.total(float(sum(torch.dot(x.flatten(), y.flatten()) for x, y in parts)))
