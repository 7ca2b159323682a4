"""One step of alternating minimisation: coding, dictionary, refit. Explicit numbers in, a new state out."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from globe.am.coding import entmax_support, propose_codes
from globe.am.dictionary.descent import Numbers, gauss_newton_step, mod_dictionary_step
from globe.am.objective import release
from globe.am.state import AMState, Constraint, start_state
from globe.numerics.group import ALONE, ProcessGroup


class StepFigures(NamedTuple):
    """How a step went. The refit is part of every attempt; its seconds are counted with the phase that made it."""

    accepted: bool
    """whether the dictionary step was taken"""
    regularised: int
    """refits at the new state that needed more than the smallest ridge"""
    seconds_coding: float
    seconds_dictionary: float
    seconds_refit: float
    """of a refit made because lam changed"""


def am_step(
    X: Float[Tensor, "n p d"],
    state: AMState,
    *,
    lam: float,
    beta: float,
    temperature: float,
    activation: str,
    generator: torch.Generator,
    dictionary: str = "gauss_newton",
    coding: bool = False,
    sparse: bool = False,
    code_map: str = "entmax15",
    l1: float = 0.0,
    joint: bool = True,
    cg_iterations: int = 10,
    momentum: float = 0.9,
    lambda_A: float = 0.0,
    lambda_B: float = 0.0,
    lambda_T: float = 0.0,
    curvature_dtype: torch.dtype | None = None,
    cg_tolerance: float = 0.0,
    total: float | None = None,
    group: ProcessGroup = ALONE,
    warm: Float[Tensor, "n r d"] | None = None,
    spend: bool = False,
) -> tuple[AMState, StepFigures]:
    """One step on sum_i ||X_i - A_i phi_lam(sum_j alpha_ij B_j)||_F^2 at the given lam, beta and T.

    dictionary   gauss_newton: the projected step, taken only if the objective falls (with beta < 1: the blended one);
                 mod: plain least squares on the targets, always taken
    coding       do a coding step first; with `sparse` its support is entmax's at `temperature`
    joint        the codes move with the bank in the Gauss-Newton step
    warm         V_i^T of the experts' truncated SVDs (n, r, d); needed when beta < 1
    generator    draws the sketch of the preconditioner; nothing else here is random
    curvature_dtype  of the products inside the conjugate gradients; None is the dtype of X
    cg_tolerance when the conjugate gradients end before `cg_iterations`; see `gauss_newton_direction`
    spend        the large tensors of the given state's point are overwritten, and the state is of no more use; the
                 new one's point may go without adapters
    total        sum_i ||X_i||_F^2 where it is known, which saves its being taken
    group        who holds the other experts, where X is a part of them
    lambda_*     relative ridges of adapters, bank and targets; `l1` penalises codes, relative to mean(diag K)

    Returns the new state, whose objective is not above the old one's for dictionary=gauss_newton as long as lam, beta
    and the support stay as they are and the penalties are zero. Raises FitError when numbers are no longer finite.
    """
    numbers = Numbers(
        lam=lam,
        beta=beta,
        activation=activation,
        cg_iterations=cg_iterations,
        cg_tolerance=cg_tolerance,
        momentum=momentum,
        joint=joint,
        lambda_A=lambda_A,
        lambda_B=lambda_B,
        lambda_T=lambda_T,
        curvature_dtype=curvature_dtype,
        total=total,
        group=group,
    )
    start = time.perf_counter()
    if spend and dictionary == "gauss_newton" and beta == 1:
        release(state.point.adapters)  # nothing below needs them
        state = state._replace(point=state.point._replace(adapters=None))
    if lam != state.lam:
        state = start_state(
            X,
            state.atoms,
            lam=lam,
            activation=activation,
            damping=state.damping,
            lambda_A=lambda_A,
            constraint=state.constraint,
            into=state.point if spend else None,
            group=group,
        )
    refitted = time.perf_counter()
    if coding:
        support = None
        if sparse:
            support = entmax_support(
                state.atoms.codes, state.atoms.bank, temperature=temperature, code_map=code_map
            )
        state = coding_step(X, state, numbers, support=support, l1=l1, spend=spend)
    coded = time.perf_counter()
    if dictionary == "mod":
        new, accepted = mod_dictionary_step(X, state, numbers, warm=warm), True
    else:
        new, accepted = gauss_newton_step(X, state, numbers, warm=warm, generator=generator, spend=spend)
    done = time.perf_counter()
    return new, StepFigures(accepted, new.point.regularised, coded - refitted, done - coded, refitted - start)


def coding_step(
    X: Float[Tensor, "n p d"],
    state: AMState,
    numbers: Numbers,
    *,
    support: Bool[Tensor, "n m"] | None = None,
    l1: float = 0.0,
    spend: bool = False,
) -> AMState:
    """New codes by least squares on `support` (None: where they may be now), expert by expert.

    With the bank fixed the objective is a sum over experts, so each keeps whichever codes leave it the smaller error:
    the proposal, or its present ones cut to the support. Without a new support no expert's error rises. With an L1
    penalty the proposal is taken as it is. `spend` as in `am_step`.
    """
    constraint, present, group = state.constraint, state.atoms.codes, numbers.group
    if support is not None:
        constraint = Constraint(support, constraint.simplex)
        present = constraint.feasible(present, present)
    proposed = propose_codes(
        state.atoms.bank,
        state.atoms.codes,
        state.point,
        support=constraint.support,
        l1=l1,
        simplex=constraint.simplex,
    )
    proposed = constraint.feasible(proposed, present)
    into = state.point if spend else None
    errors = state.point.errors
    if l1 == 0 and group.any(not torch.equal(present, state.atoms.codes)):
        errors = numbers.evaluate(X, state.atoms.with_codes(present), into).errors
    point, codes = numbers.evaluate(X, state.atoms.with_codes(proposed), into), proposed
    if l1 == 0:
        # rounding must not decide a tie, as between two scales of a single atom
        better = point.errors < errors * (1 - 100 * torch.finfo(errors.dtype).eps)
        codes = torch.where(better[:, None], proposed, present)
    atoms = state.atoms.with_codes(codes)
    if group.any(not torch.equal(codes, proposed)):
        point = numbers.evaluate(X, atoms, point)
    # the bank stands still here, so the extrapolation may go on; the codes' share of it starts anew
    anchor = state.anchor.with_codes(codes)
    return state._replace(atoms=atoms, point=point, anchor=anchor, constraint=constraint)
