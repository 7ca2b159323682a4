"""A problem so small that a step's dense normal matrix can be written down, and its move by the fast path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from planted import normal
from torch import Tensor

from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.preconditioner import precondition
from globe.am.dictionary.remainder import Remainder
from globe.am.dictionary.tangent import Tangent, tangent
from globe.am.objective import Point
from globe.am.state import Atoms, low_rank_atoms

N, P, D, M, R, K = 6, 7, 9, 3, 4, 2
ENOUGH = 1500
"""conjugate-gradient iterations that solve these systems to rounding"""


class Case(NamedTuple):
    X: Tensor
    atoms: Atoms
    free: Tensor | None


def case(*, n: int = N, m: int = M, low_rank: bool = False, masked: bool = False, seed: int = 0) -> Case:
    X, codes = normal(n, P, D, seed=seed), 0.2 + normal(n, m, seed=seed + 1).abs()
    free = None
    if masked:
        free = normal(n, m, seed=seed + 2) > -0.3
        free[:, 0] |= ~free.any(dim=1)
        codes = codes * free
    if low_rank:
        atoms = low_rank_atoms(normal(m, R, K, seed=seed + 3), normal(m, K, D, seed=seed + 4), codes)
    else:
        atoms = Atoms(normal(m, R, D, seed=seed + 3), codes)
    return Case(X, atoms, free)


def sketcher() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def slopes_at(one: Case, *, joint: bool) -> Tangent:
    atoms = one.atoms
    return tangent(atoms.bank, atoms.codes, left=atoms.left, right=atoms.right, free=one.free, joint=joint)


def direction(
    one: Case, at: Point, *, joint: bool, damping: float, lambda_B: float = 0.0, force: Tensor | None = None
) -> dict[str, Tensor]:
    """The fast path's move, by name, in plain atoms."""
    found = gauss_newton_direction(
        slopes_at(one, joint=joint),
        at,
        cg_iterations=ENOUGH,
        damping=damping,
        generator=sketcher(),
        lambda_B=lambda_B,
        force=force,
    )
    names = ("bank",) if one.atoms.left is None else ("left", "right")
    return dict(zip((*names, "codes") if joint else names, found.move, strict=True))


def damping_units(
    one: Case, at: Point, *, joint: bool, damping: float, kept: Remainder | None = None
) -> dict[str, float]:
    slopes = slopes_at(one, joint=joint)
    scales = precondition(slopes, at, damping=damping, generator=sketcher(), kept=kept).damping
    names = ("bank",) if one.atoms.left is None else ("left", "right")
    return dict(zip((*names, "codes") if joint else names, scales, strict=True))


def assert_same_moves(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The moves agree to the root of 1e-14, the ridge that holds adapters of a basis M_i of lower rank than r.

    One low-rank atom is such a basis; there 3e-10 has been seen, and with full rank 1e-12, a condition of 2e4.
    """
    relative = 1e-14**0.5
    assert found.keys() == wanted.keys()
    for name, move in wanted.items():
        scale = float(move.norm())
        assert scale > 0, name
        assert float((found[name] - move).norm()) <= relative * scale, name
