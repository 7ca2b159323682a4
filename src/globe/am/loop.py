"""The fit of one bank: schedules, support control, validation, stopping and checkpoints around `am_step`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.coding import median_support
from globe.am.controls import Controls, Phase, controls_at, share_of_fit
from globe.am.dictionary.low_precision import curvature_dtype
from globe.am.objective import release
from globe.am.options import FitOptions
from globe.am.problem import Problem, cut_support, step_record, validation_relfrob
from globe.am.records import Factors, FitResult, FitState, Sizes, StepRecord, StopReason
from globe.am.running import Best, Progress, Running, restore, snapshot
from globe.am.start import first_atoms
from globe.am.state import AMState, Constraint, adapters_of, start_state
from globe.am.step import StepFigures, am_step
from globe.am.temperature import next_temperature
from globe.am.warm_start import truncated_svd
from globe.errors import FitError
from globe.numerics.figures import energy_of_rank, squared_norms
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.metric import Metric

_STALLED_AFTER = 12
"""Refused steps in a row; the damping has then grown by 5^12 and nothing descends any more."""
_RIDGE_OF_ERROR = 0.1
"""The relative ridge of the adapters is at most this share of the squared relative error that a fit begins with."""


def fit_bank(
    experts: Float[Tensor, "n p d"],
    sizes: Sizes,
    options: FitOptions,
    *,
    generator: torch.Generator,
    metric: Metric | None = None,
    resume: FitState | None = None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    on_checkpoint: Callable[[FitState], None] = lambda state: None,
    clock: Callable[[], float] = time.perf_counter,
    group: ProcessGroup = ALONE,
) -> FitResult:
    """Learn bank, codes and adapters for normalised experts X (n, p, d).

    Minimises sum_i ||X_i - A_i phi_lam(sum_j alpha_ij B_j)||_F^2, with the ridge of `objective`, by alternating
    minimisation (`am_step`). With several processes, X are the experts of this one and `sizes` those of the whole bank;
    all processes call this with equal arguments otherwise. Every conjugate-gradient iteration then sums the move of the
    atoms over the processes, m r d numbers or m k (r + d) with low-rank atoms, and two scalars. k-means seeding, MOD
    and beta < 1 need experts that other processes hold.

    Parameters
    ----------
    generator      draws the start, on the CPU; nothing is drawn from it after the first step
    metric         L_i of experts given as X_i L_i; errors are then those of X_i L_i, the factors those of X_i
    resume         state of `on_checkpoint` to continue from, bit for bit on the same machine (a time limit apart)
    on_step        gets the record of every step
    on_checkpoint  gets a state every `options.checkpoint_every` seconds
    clock          counts the seconds of limits and records
    group          the processes that hold the other experts

    Returns
    -------
    The factors, with codes and adapters of the experts here, and how the fit went.

    Raises FitError when numbers are no longer finite.
    """
    started = clock()
    problem, running = _begin(experts, sizes, options, generator, metric, resume, group)
    before, saved = running.progress.seconds, 0.0
    stop = None
    while stop is None:
        share = share_of_fit(options, running.progress.step, running.progress.seconds)
        controls = controls_at(options, sizes, share)
        running = _control(problem, running, controls)
        running, figures = _advance(problem, running, controls)
        spent = group.agreed(clock() - started)  # so that limits end the fit at the same step everywhere
        running = running._replace(progress=_count(running.progress, figures, before + spent))
        running, validation = _validate(problem, running)
        on_step(step_record(problem, running, controls, figures, validation))
        stop = _stop_reason(options, running.progress, controls)
        if stop is None and spent - saved >= options.checkpoint_every:
            on_checkpoint(snapshot(running, group))
            saved = spent
    return _finish(problem, running, controls, stop)


def _begin(
    X: Float[Tensor, "n p d"],
    sizes: Sizes,
    options: FitOptions,
    generator: torch.Generator,
    metric: Metric | None,
    resume: FitState | None,
    group: ProcessGroup,
) -> tuple[Problem, Running]:
    total = group.total(float(squared_norms(X).sum()))
    if not math.isfinite(total):
        raise FitError(
            "an expert's weights are not finite: check the checkpoint for NaN and infinite numbers"
        )
    bases_for_codes = resume is None and options.start.codes != "mixed"
    pulls = min(options.beta.start, options.beta.end) < 1
    warm = truncated_svd(X, sizes.r) if bases_for_codes or pulls else None
    products = curvature_dtype(options.curvature, X)
    saved = None
    if resume is not None:
        options = _of_start(options, float(resume.numbers["relfrob_start"] or 0.0))
        saved = restore(resume, X, options.step, metric=metric, group=group)
        products = torch.bfloat16 if saved.progress.low_precision else X.dtype
    options = replace(options, step=replace(options.step, curvature_dtype=products))
    bases = warm.bases if warm is not None and pulls else None
    problem = Problem(X, sizes, options, bases, total, metric, group)
    if saved is not None:
        return problem, saved
    seed = int(torch.randint(2**31, (1,), generator=generator))
    atoms = first_atoms(X, sizes, options.start, generator=generator, warm=warm, metric=metric, group=group)
    del warm  # as large as the state that comes now
    state = start_state(
        X,
        atoms,
        replace(options.step, lam=options.lam.at(0.0)),
        damping=options.damping,
        constraint=Constraint(None, options.simplex),
        metric=metric,
        group=group,
    )
    low = products is torch.bfloat16
    progress = Progress(seed, problem.relfrob(state.point.error), low_precision=low)
    problem = replace(problem, options=_of_start(options, progress.relfrob_start))
    if problem.options.step.lambda_A < options.step.lambda_A:
        state = start_state(
            X,
            state.atoms,
            problem.options.step,
            damping=state.damping,
            constraint=state.constraint,
            metric=metric,
            into=state.point,
            group=group,
        )
    return problem, Running(state, Best.of(state), progress, None)


def _of_start(options: FitOptions, relfrob_start: float) -> FitOptions:
    """Return the options with the ridge that the first error allows: a larger one would be most of what is left."""
    ridge = max(options.least_ridge, _RIDGE_OF_ERROR * relfrob_start**2)
    return replace(options, step=replace(options.step, lambda_A=min(options.step.lambda_A, ridge)))


def _control(problem: Problem, running: Running, controls: Controls) -> Running:
    """Control the temperature in its phase, and cut the support to its target when the frozen phase begins."""
    options, progress = problem.options, running.progress
    target = problem.sizes.target_support
    if target is None or controls.phase is Phase.dense or progress.frozen:
        return running
    if controls.phase is Phase.control:
        if progress.step % options.control_every:
            return running
        median = median_support(problem.group.gather(running.state.atoms.codes))
        factor = next_temperature(progress.temperature_factor, median, target, eta=options.eta)
        return running._replace(progress=replace(progress, temperature_factor=factor))
    return running._replace(
        state=cut_support(problem, running.state, controls), progress=replace(progress, frozen=True)
    )


def _advance(problem: Problem, running: Running, controls: Controls) -> tuple[Running, StepFigures]:
    progress, options, every = running.progress, problem.options.step, problem.options.coding_every
    # codes that move with the bank need no step of their own, which would only break the extrapolation
    coding = not options.joint or options.dictionary == "mod"
    coding = coding or controls.phase is Phase.control or options.l1 > 0
    state, figures = am_step(
        problem.X,
        running.state,
        problem.at(
            controls,
            temperature_factor=progress.temperature_factor,
            coding=coding and every > 0 and progress.step % every == 0,
        ),
        # one draw per step, so that a resumed fit draws the same
        generator=torch.Generator().manual_seed(progress.seed * 1_000_003 + progress.step),
        warm=problem.warm,
        total=problem.total,
        group=problem.group,
        spend=True,
    )
    best = running.best
    changed = state.lam != best.lam or state.constraint is not best.constraint
    # a blended target and a price on codes are followed at the expense of the objective
    if changed or controls.beta < 1 or options.l1 > 0 or state.objective <= best.objective:
        best = Best.of(state)
    return running._replace(state=state, best=best), figures


def _count(progress: Progress, figures: StepFigures, seconds: float) -> Progress:
    return replace(
        progress,
        step=progress.step + 1,
        seconds=seconds,
        accepted=progress.accepted + figures.accepted,
        rejected=progress.rejected + (not figures.accepted),
        refused_in_a_row=0 if figures.accepted else progress.refused_in_a_row + 1,
        regularised=progress.regularised + figures.regularised,
    )


def _validate(problem: Problem, running: Running) -> tuple[Running, float | None]:
    """Return, every `train.evaluate_every` steps, the error of what would be exported now."""
    progress, options = running.progress, problem.options
    if progress.step % options.evaluate_every:
        return running, None
    error = validation_relfrob(problem, running.state)
    used = running.state.atoms.codes > 0
    changed = (
        running.seen is None or float(problem.group.average((used != running.seen).double().mean())) > 0.01
    )
    better = error < progress.best_validation * (1 - options.tolerance)
    progress = replace(
        progress,
        best_validation=min(error, progress.best_validation),
        validations_without=0 if better or changed else progress.validations_without + 1,
    )
    return running._replace(progress=progress, seen=used), error


def _stop_reason(options: FitOptions, progress: Progress, controls: Controls) -> StopReason | None:
    if progress.step >= options.steps:
        return StopReason.steps
    if options.time_limit is not None and progress.seconds >= options.time_limit:
        return StopReason.time
    if progress.refused_in_a_row >= _STALLED_AFTER and controls.final:
        return StopReason.stalled
    if options.patience and controls.final and progress.validations_without >= options.patience:
        return StopReason.converged
    return None


def _finish(problem: Problem, running: Running, controls: Controls, stop: StopReason) -> FitResult:
    state, progress = _state_of_best(problem, running), running.progress
    if problem.sizes.target_support is not None and not progress.frozen:
        state = cut_support(problem, state, controls)
    atoms = state.atoms
    release(state.point.rows, state.point.slope, state.point.force, state.point.gram)
    adapters = adapters_of(problem.X, state, problem.options.step)
    captured = problem.group.total(energy_of_rank(problem.X, problem.sizes.r))
    return FitResult(
        factors=Factors(atoms.bank, atoms.codes, adapters, atoms.left, atoms.right),
        lam=state.lam,
        lambda_A=problem.options.step.lambda_A,
        stop=stop,
        steps=progress.step,
        relfrob_start=progress.relfrob_start,
        relfrob=problem.relfrob(state.point.error),
        energy_captured=captured / problem.total if problem.total else 1.0,
        accepted=progress.accepted,
        rejected=progress.rejected,
        regularised_solves=progress.regularised,
        seconds=progress.seconds,
    )


def _state_of_best(problem: Problem, running: Running) -> AMState:
    """Return the best state with its point, made in the memory of the present one where they differ."""
    state, best = running.state, running.best
    if best.atoms is state.atoms:
        return state
    return start_state(
        problem.X,
        best.atoms,
        replace(problem.options.step, lam=best.lam),
        constraint=best.constraint,
        metric=problem.metric,
        into=state.point,
        group=problem.group,
    )
