"""The dictionary step taken: Gauss-Newton directions tried and accepted or refused, and plain MOD."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.mod import linearised_targets, mod_step, rescale_gauge
from globe.am.dictionary.tangent import tangent
from globe.am.dictionary.targets import aligned_warm_start, blend, weight_aware_targets
from globe.am.objective import Point, adapters_at, evaluate, mix
from globe.am.state import AMState, Atoms
from globe.numerics.activation import phi
from globe.numerics.chunks import expert_chunks
from globe.numerics.figures import squared_norms
from globe.numerics.group import ALONE, ProcessGroup

_DOWN, _UP = 2.5, 5.0
_LEAST, _MOST = 1e-6, 1e5
_OF_ERROR = 0.1
"""The damping goes down to this share of the relative objective, so that it vanishes with the error (Fan and Yuan 2005)
and exact problems are solved exactly. At an error of 0.34, floors of 1e-3, 1e-2, 3e-2 and 0.1 gave 0.3451, 0.3436,
0.3446 and worse with low-rank atoms in the same time; with dense ones the first two did alike."""
_FINE = 3e-4
"""A step that promises less than this share of the objective is the last in low precision. Kept to the end,
bfloat16 products stalled a linear fit at 0.3544 that reaches 0.3532 in the same 48 steps of 20 iterations without them;
with the truncation test 3e-4 costs no error at equal steps, a fifth faster than with 3e-3."""
_DOUBTED = 1e-2
"""So is a refused step that promised less than this. One that promised more, as first steps do, fails for its length:
rounding is not to blame, and the damping rises until a next one promises less."""


class Numbers(NamedTuple):
    """The scalars of a step that its parts share; see `am_step`."""

    lam: float
    beta: float
    activation: str
    cg_iterations: int
    momentum: float
    joint: bool
    lambda_A: float
    lambda_B: float
    lambda_T: float
    curvature_dtype: torch.dtype | None = None
    cg_tolerance: float = 0.0
    total: float | None = None
    """sum_i ||X_i||_F^2 where it is known"""
    group: ProcessGroup = ALONE

    def evaluate(self, X: Float[Tensor, "n p d"], atoms: Atoms, into: Point | None = None) -> Point:
        return evaluate(
            X,
            atoms.bank,
            atoms.codes,
            lam=self.lam,
            activation=self.activation,
            lambda_A=self.lambda_A,
            into=into,
            group=self.group,
        )

    def adapters(self, X: Float[Tensor, "n p d"], state: AMState) -> Float[Tensor, "n p r"]:
        """Of the state's point, or made anew where it goes without."""
        if state.point.adapters is not None:
            return state.point.adapters
        bank, codes = state.atoms.bank, state.atoms.codes
        return adapters_at(X, bank, codes, lam=state.lam, activation=self.activation, lambda_A=self.lambda_A)

    def energy(self, X: Float[Tensor, "n p d"]) -> float:
        total = self.group.total(float(squared_norms(X).sum())) if self.total is None else self.total
        return total or 1.0

    def bases(self, atoms: Atoms) -> Float[Tensor, "n r d"]:
        """M_i = phi_lam(Y_i) of all experts; only the steps off the fast path need it."""
        return phi(mix(atoms.codes, atoms.bank), lam=self.lam, activation=self.activation)


def gauss_newton_step(
    X: Float[Tensor, "n p d"],
    state: AMState,
    numbers: Numbers,
    *,
    warm: Float[Tensor, "n r d"] | None,
    generator: torch.Generator,
    spend: bool = False,
) -> tuple[AMState, bool]:
    """One projected Gauss-Newton step, and whether it was taken.

    A step that lowers the objective is taken and the damping falls; tried first extrapolated (Nesterov, weight
    k / (k + 3) up to `momentum`), then, if that does not descend, as it is with the momentum reset. If neither
    descends the state stays, the momentum is dropped and the damping rises fivefold.

    With `spend` the candidates' points are made in the memory of the given state's, which is then of no more use;
    a refused step makes its own anew.
    """
    pull = None
    if numbers.beta < 1:
        assert warm is not None, "beta below 1 needs the warm start"
        pull = aligned_warm_start(warm, numbers.bases(state.atoms))
    slopes = tangent(
        state.atoms.bank,
        state.atoms.codes,
        left=state.atoms.left,
        right=state.atoms.right,
        free=state.constraint.support,
        joint=numbers.joint,
        group=numbers.group,
    )
    direction = gauss_newton_direction(
        slopes,
        state.point,
        cg_iterations=numbers.cg_iterations,
        cg_tolerance=numbers.cg_tolerance,
        damping=state.damping,
        generator=generator,
        lambda_B=numbers.lambda_B,
        force=None if pull is None else _blended_force(state, pull, numbers),
        curvature_dtype=None if state.fine else numbers.curvature_dtype,
        spend=spend and pull is None,
    )
    promised = direction.predicted
    if promised < _FINE * state.objective:
        state = state._replace(fine=True)
    plain = state.atoms.moved(direction.move, state.constraint, joint=numbers.joint)
    del slopes, direction
    into = state.point if spend else None
    relaxed = max(_LEAST, _OF_ERROR * state.objective / numbers.energy(X), state.damping / _DOWN)
    if pull is not None:
        adapters = numbers.adapters(X, state)
        error = _blended_error(X, adapters, state.atoms, pull, numbers)
        if _blended_error(X, adapters, plain, pull, numbers) < error:
            point = numbers.evaluate(X, plain, into)
            return state._replace(
                atoms=plain, point=point, anchor=plain, momentum_steps=0, damping=relaxed
            ), True
        return _refused(state, promised), False
    count = state.momentum_steps + 1
    weight = min(numbers.momentum, count / (count + 3))
    if weight > 0:
        beyond = plain.beyond(state.anchor, weight, state.constraint)
        point = numbers.evaluate(X, beyond, into)
        if point.objective < state.objective:
            return state._replace(
                atoms=beyond, point=point, anchor=plain, momentum_steps=count, damping=relaxed
            ), True
        del point, beyond
    point = numbers.evaluate(X, plain, into)
    if point.objective < state.objective:
        return state._replace(atoms=plain, point=point, anchor=plain, momentum_steps=0, damping=relaxed), True
    if spend:
        state = state._replace(point=numbers.evaluate(X, state.atoms, into))
    return _refused(state, promised), False


def _refused(state: AMState, promised: float) -> AMState:
    fine = state.fine or promised < _DOUBTED * state.objective
    return state._replace(
        anchor=state.atoms, momentum_steps=0, damping=min(_MOST, state.damping * _UP), fine=fine
    )


def _blended_force(state: AMState, pull: Float[Tensor, "n r d"], numbers: Numbers) -> Float[Tensor, "n r d"]:
    """J * A^T (X~ - A M) for the target X~ = beta X + (1 - beta) A pull."""
    away = torch.bmm(state.point.gram, pull - numbers.bases(state.atoms))
    if state.point.slope is not None:
        away *= state.point.slope
    return torch.lerp(away, state.point.force, numbers.beta)


def _blended_error(
    X: Float[Tensor, "n p d"],
    A: Float[Tensor, "n p r"],
    atoms: Atoms,
    pull: Float[Tensor, "n r d"],
    numbers: Numbers,
) -> float:
    """sum_i ||X~_i - A_i M_i||^2 at adapters A, for the blended target X~ of `_blended_force`."""
    total = 0.0
    for part in expert_chunks(*X.shape):
        M = phi(mix(atoms.codes[part], atoms.bank), lam=numbers.lam, activation=numbers.activation)
        wanted = torch.lerp(A[part] @ pull[part], X[part], numbers.beta)
        total += float(torch.linalg.vector_norm(wanted - A[part] @ M)) ** 2
    return total


def mod_dictionary_step(
    X: Float[Tensor, "n p d"],
    state: AMState,
    numbers: Numbers,
    *,
    warm: Float[Tensor, "n r d"] | None,
) -> AMState:
    """Plain MOD on blended targets, atoms brought to equal norms, then the refit; always taken, may ascend."""
    assert state.atoms.left is None, "MOD needs dense atoms"
    Y = mix(state.atoms.codes, state.atoms.bank)
    M = phi(Y, lam=numbers.lam, activation=numbers.activation)
    target = weight_aware_targets(X, numbers.adapters(X, state), lambda_T=numbers.lambda_T)
    pull = None if numbers.beta == 1 or warm is None else aligned_warm_start(warm, M)
    target = linearised_targets(Y, M, state.point.slope, blend(numbers.beta, target, pull))
    bank = mod_step(target, state.atoms.codes, state.atoms.bank, lambda_B=numbers.lambda_B)
    atoms = Atoms(bank, state.atoms.codes)
    if not state.constraint.simplex:
        atoms = Atoms(*rescale_gauge(bank, state.atoms.codes))
    return state._replace(atoms=atoms, point=numbers.evaluate(X, atoms), anchor=atoms, momentum_steps=0)
