"""The dictionary step taken: Gauss-Newton directions tried and accepted or refused, and plain MOD."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.mod import linearised_targets, mod_step, rescale_gauge
from globe.am.dictionary.tangent import tangent
from globe.am.dictionary.targets import aligned_warm_start, blend, weight_aware_targets
from globe.am.objective import evaluate, mix
from globe.am.records import StepOptions
from globe.am.refit import ridge_of
from globe.am.state import AMState, Atoms, adapters_of
from globe.numerics.activation import phi
from globe.numerics.chunks import expert_chunks
from globe.numerics.figures import squared_norms
from globe.numerics.group import ALONE, ProcessGroup

_DOWN, _UP = 2.5, 5.0
_LEAST, _MOST = 1e-6, 1e5
_OF_ERROR = 0.1
"""The damping goes down to this share of the relative objective, so that it vanishes with the error (Fan and Yuan 2005)
and exact problems are solved exactly."""
_OF_ERROR_IN_METRIC = 0.5
"""The same share in a metric, where the adapters take up nearly all the energy and the curvature left is small beside
the damping's unit."""
_FINE = 3e-4
"""A step that promises less than this share of the objective is the last in low precision, which would stall the fit if
it were kept to the end."""
_DOUBTED = 1e-2
"""So is a refused step that promised less than this. One that promised more, as first steps do, fails for its length:
rounding is not to blame, and the damping rises until a next one promises less."""


def gauss_newton_step(
    X: Float[Tensor, "n p d"],
    state: AMState,
    options: StepOptions,
    *,
    generator: torch.Generator,
    warm: Float[Tensor, "n r d"] | None = None,
    total: float | None = None,
    group: ProcessGroup = ALONE,
    spend: bool = False,
) -> tuple[AMState, bool]:
    """Take one projected Gauss-Newton step; return the state after it, and whether the step was taken.

    A step that lowers the objective is taken and the damping falls. It is tried first extrapolated (Nesterov, weight
    k / (k + 3) up to `momentum`), then, if that does not descend, as it is with the momentum reset. If neither
    descends the state stays, the momentum is dropped and the damping rises fivefold.

    With `spend` the candidates' points are made in the memory of the given state's, which is then of no more use;
    a refused step makes its own anew.
    """
    pull, metric = None, state.point.metric
    if options.beta < 1:
        assert warm is not None, "beta below 1 needs the warm start"
        pull = aligned_warm_start(warm, _bases(state, options))
    plain, promised = _proposed(state, options, pull, generator=generator, group=group, spend=spend)
    if promised < _FINE * state.objective:
        state = state._replace(fine=True)
    if total is None:
        total = group.total(float(squared_norms(X).sum()))
    share = _OF_ERROR if metric is None else _OF_ERROR_IN_METRIC
    relaxed = max(_LEAST, share * state.objective / (total or 1.0), state.damping / _DOWN)
    into = state.point if spend else None
    if pull is not None:
        adapters = adapters_of(X, state, options)
        error = _blended_error(X, adapters, state, pull, options)
        if not _blended_error(X, adapters, state._replace(atoms=plain), pull, options) < error:
            return _refused(state, promised), False
        point = evaluate(X, plain.bank, plain.codes, options, metric=metric, into=into, group=group)
        return state._replace(atoms=plain, point=point, anchor=plain, momentum_steps=0, damping=relaxed), True
    for atoms, momentum_steps in _candidates(state, plain, options):
        point = evaluate(X, atoms.bank, atoms.codes, options, metric=metric, into=into, group=group)
        if point.objective < state.objective:
            return state._replace(
                atoms=atoms, point=point, anchor=plain, momentum_steps=momentum_steps, damping=relaxed
            ), True
        del point, atoms  # before the next one is made
    if spend:
        state = state._replace(
            point=evaluate(
                X, state.atoms.bank, state.atoms.codes, options, metric=metric, into=into, group=group
            )
        )
    return _refused(state, promised), False


def _proposed(
    state: AMState,
    options: StepOptions,
    pull: Float[Tensor, "n r d"] | None,
    *,
    generator: torch.Generator,
    group: ProcessGroup,
    spend: bool,
) -> tuple[Atoms, float]:
    """Return the atoms at the end of the direction, and the fall of the objective that the model promises there."""
    direction = gauss_newton_direction(
        tangent(
            state.atoms.bank,
            state.atoms.codes,
            left=state.atoms.left,
            right=state.atoms.right,
            free=state.constraint.support,
            joint=options.joint,
            group=group,
        ),
        state.point,
        cg_iterations=options.cg_iterations,
        cg_tolerance=options.cg_tolerance,
        damping=state.damping,
        generator=generator,
        lambda_B=options.lambda_B,
        force=None if pull is None else _blended_force(state, pull, options),
        curvature_dtype=None if state.fine else options.curvature_dtype,
        spend=spend and pull is None,
    )
    return state.atoms.moved(direction.move, state.constraint, joint=options.joint), direction.predicted


def _candidates(state: AMState, plain: Atoms, options: StepOptions) -> Iterator[tuple[Atoms, int]]:
    """Yield the extrapolated step and the plain one, each with the count of momentum steps after it."""
    count = state.momentum_steps + 1
    weight = min(options.momentum, count / (count + 3))
    if weight > 0:
        yield plain.beyond(state.anchor, weight, state.constraint), count
    yield plain, 0


def _refused(state: AMState, promised: float) -> AMState:
    fine = state.fine or promised < _DOUBTED * state.objective
    return state._replace(
        anchor=state.atoms, momentum_steps=0, damping=min(_MOST, state.damping * _UP), fine=fine
    )


def _bases(state: AMState, options: StepOptions) -> Float[Tensor, "n r d"]:
    """Return M_i = phi_lam(Y_i) L_i of all experts; only the steps off the fast path need it."""
    return _in_metric(state, _activated(state.atoms, options, slice(None)), slice(None))


def _activated(atoms: Atoms, options: StepOptions, part: slice) -> Float[Tensor, "c r d"]:
    return phi(mix(atoms.codes[part], atoms.bank), lam=options.lam, activation=options.activation)


def _in_metric(state: AMState, M: Float[Tensor, "c r d"], part: slice) -> Float[Tensor, "c r d"]:
    """Return M_i L_i with the metric of the state's point."""
    return M if state.point.metric is None else state.point.metric.times(M, part)


def _blended_force(
    state: AMState, pull: Float[Tensor, "n r d"], options: StepOptions
) -> Float[Tensor, "n r d"]:
    """Return J * A^T (X~ - A M) L^T for X~ = beta X + (1 - beta) A pull, with M and pull as the metric sees them."""
    away = torch.bmm(state.point.gram, pull - _bases(state, options))
    if state.point.metric is not None:
        away = state.point.metric.adjoint(away, slice(None))
    if state.point.slope is not None:
        away *= state.point.slope
    return torch.lerp(away, state.point.force, options.beta)


def _blended_error(
    X: Float[Tensor, "n p d"],
    A: Float[Tensor, "n p r"],
    state: AMState,
    pull: Float[Tensor, "n r d"],
    options: StepOptions,
) -> float:
    """Return sum_i ||X~_i - A_i M_i||^2 + beta rho_i ||A_i||^2 at adapters A, for the target X~ of `_blended_force`."""
    total, ridge = 0.0, options.beta * ridge_of(options.lambda_A, X.dtype) / A.shape[2]
    for part in expert_chunks(*X.shape):
        M = _in_metric(state, _activated(state.atoms, options, part), part)
        wanted = torch.lerp(A[part] @ pull[part], X[part], options.beta)
        total += float(torch.linalg.vector_norm(wanted - A[part] @ M)) ** 2
        sizes = torch.linalg.vector_norm(A[part], dim=(1, 2)) * torch.linalg.vector_norm(M, dim=(1, 2))
        total += ridge * float(sizes.square().sum())
    return total


def mod_dictionary_step(
    X: Float[Tensor, "n p d"],
    state: AMState,
    options: StepOptions,
    *,
    warm: Float[Tensor, "n r d"] | None = None,
    group: ProcessGroup = ALONE,
) -> AMState:
    """Take a step of plain MOD on blended targets, bring the atoms to equal norms, and refit; the objective may rise.

    In a metric the targets are those of M_i L_i, brought back by L_i^-1: like A_i^T A_i, the metric itself is dropped.
    """
    assert state.atoms.left is None, "MOD needs dense atoms"
    metric = state.point.metric
    Y = mix(state.atoms.codes, state.atoms.bank)
    M = phi(Y, lam=options.lam, activation=options.activation)
    target = weight_aware_targets(X, adapters_of(X, state, options), lambda_T=options.lambda_T)
    seen = _in_metric(state, M, slice(None))
    pull = None if options.beta == 1 or warm is None else aligned_warm_start(warm, seen)
    target = blend(options.beta, target, pull)
    if metric is not None:
        target = metric.solved(target, slice(None))
    target = linearised_targets(Y, M, state.point.slope, target)
    bank = mod_step(target, state.atoms.codes, state.atoms.bank, lambda_B=options.lambda_B)
    atoms = Atoms(bank, state.atoms.codes)
    if not state.constraint.simplex:
        atoms = Atoms(*rescale_gauge(bank, state.atoms.codes))
    point = evaluate(X, atoms.bank, atoms.codes, options, metric=metric, group=group)
    return state._replace(atoms=atoms, point=point, anchor=atoms, momentum_steps=0)
