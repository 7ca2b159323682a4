"""One step of alternating minimisation: coding, dictionary, refit. Explicit numbers in, a new state out."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from globe.am.coding import entmax_support, propose_codes
from globe.am.dictionary.descent import gauss_newton_step, mod_dictionary_step
from globe.am.objective import evaluate, release
from globe.am.records import StepOptions
from globe.am.state import AMState, Constraint, start_state
from globe.numerics.group import ALONE, ProcessGroup


class StepFigures(NamedTuple):
    """How a step went. The refit is part of every attempt; its seconds are counted with the phase that made it."""

    accepted: bool
    """whether the dictionary step was taken"""
    regularised: int
    """refits at the new state that were too ill-conditioned for Cholesky"""
    seconds_coding: float
    seconds_dictionary: float
    seconds_refit: float
    """of a refit made because lam changed"""


def am_step(
    X: Float[Tensor, "n p d"],
    state: AMState,
    options: StepOptions,
    *,
    generator: torch.Generator,
    warm: Float[Tensor, "n r d"] | None = None,
    total: float | None = None,
    group: ProcessGroup = ALONE,
    spend: bool = False,
) -> tuple[AMState, StepFigures]:
    """Take one step on sum_i ||X_i - A_i phi_lam(sum_j alpha_ij B_j) L_i||_F^2, with the metric L of the state's point.

    Parameters
    ----------
    X          the experts (n, p, d), X_i L_i where there is a metric
    state      where the fit stands; see `start_state`
    options    lam, beta, temperature and the other scalars of the step
    generator  draws the sketch of the preconditioner; nothing else here is random
    warm       V_i^T of the experts' truncated SVDs (n, r, d); needed when beta < 1
    total      sum_i ||X_i||_F^2 over all processes where it is known, which saves computing it
    group      the processes that hold the other experts, where X is a part of them
    spend      whether the large tensors of the given state's point may be overwritten; the state is then of no more
               use, and the new one's point may go without adapters

    Returns
    -------
    The new state and how the step went. The new objective is not above the old one's for dictionary=gauss_newton as
    long as lam, beta and the support stay as they are and the penalties are zero.

    Raises FitError when numbers are no longer finite.
    """
    start = time.perf_counter()
    if spend and options.dictionary == "gauss_newton" and options.beta == 1:
        release(state.point.adapters)  # nothing below needs them
        state = state._replace(point=state.point._replace(adapters=None))
    if options.lam != state.lam:
        state = start_state(
            X,
            state.atoms,
            options,
            damping=state.damping,
            constraint=state.constraint,
            metric=state.point.metric,
            into=state.point if spend else None,
            group=group,
        )
    refitted = time.perf_counter()
    if options.coding:
        support = _chosen_support(state, options) if options.sparse else None
        state = coding_step(X, state, options, support=support, group=group, spend=spend)
    coded = time.perf_counter()
    if options.dictionary == "mod":
        new, accepted = mod_dictionary_step(X, state, options, warm=warm, group=group), True
    else:
        new, accepted = gauss_newton_step(
            X, state, options, generator=generator, warm=warm, total=total, group=group, spend=spend
        )
    done = time.perf_counter()
    return new, StepFigures(accepted, new.point.regularised, coded - refitted, done - coded, refitted - start)


def _chosen_support(state: AMState, options: StepOptions) -> Bool[Tensor, "n m"]:
    codes, bank = state.atoms.codes, state.atoms.bank
    return entmax_support(codes, bank, temperature=options.temperature, code_map=options.code_map)


def coding_step(
    X: Float[Tensor, "n p d"],
    state: AMState,
    options: StepOptions,
    *,
    support: Bool[Tensor, "n m"] | None = None,
    group: ProcessGroup = ALONE,
    spend: bool = False,
) -> AMState:
    """Find new codes by least squares on `support` (None: where they may be now), expert by expert.

    With the bank fixed the objective is a sum over experts, so each keeps whichever codes leave it the smaller error:
    the proposal, or its present ones cut to the support. Without a new support no expert's error rises. With an L1
    penalty the proposal is taken as it is. `spend` as in `am_step`.
    """
    constraint, present, metric = state.constraint, state.atoms.codes, state.point.metric
    if support is not None:
        constraint = Constraint(support, constraint.simplex)
        present = constraint.feasible(present, present)
    proposed = propose_codes(
        state.atoms.bank,
        state.atoms.codes,
        state.point,
        support=constraint.support,
        l1=options.l1,
        simplex=constraint.simplex,
    )
    proposed = constraint.feasible(proposed, present)
    into = state.point if spend else None
    objectives = state.point.errors + state.point.penalties
    if options.l1 == 0 and group.any(not torch.equal(present, state.atoms.codes)):
        cut = evaluate(X, state.atoms.bank, present, options, metric=metric, into=into, group=group)
        objectives = cut.errors + cut.penalties
    new = state.atoms.with_codes(proposed)
    point = evaluate(X, new.bank, new.codes, options, metric=metric, into=into, group=group)
    codes = proposed
    if options.l1 == 0:
        # rounding must not decide a tie, as between two scales of a single atom
        better = point.errors + point.penalties < objectives * (1 - 100 * torch.finfo(X.dtype).eps)
        codes = torch.where(better[:, None], proposed, present)
    atoms = state.atoms.with_codes(codes)
    if group.any(not torch.equal(codes, proposed)):
        point = evaluate(X, atoms.bank, atoms.codes, options, metric=metric, into=point, group=group)
    # the bank stands still here, so the extrapolation may go on; the codes' share of it starts anew
    anchor = state.anchor.with_codes(codes)
    return state._replace(atoms=atoms, point=point, anchor=anchor, constraint=constraint)
