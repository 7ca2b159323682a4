"""What stays the same through a fit, and what is asked of a state of it: support, validation error, a record."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.coding import support_of_median
from globe.am.controls import Controls, Phase
from globe.am.objective import error_at
from globe.am.options import FitOptions
from globe.am.records import Sizes, StepOptions, StepRecord
from globe.am.running import Running
from globe.am.state import AMState
from globe.am.step import StepFigures, coding_step
from globe.am.temperature import prune
from globe.numerics.figures import support_sizes
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.metric import Metric


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What stays the same through a fit."""

    X: Float[Tensor, "n p d"]
    sizes: Sizes
    options: FitOptions
    warm: Float[Tensor, "n r d"] | None
    """V_i^T of the experts' truncated SVDs, where the schedule of beta asks for them"""
    total: float
    """sum_i ||X_i||_F^2, over all processes"""
    metric: Metric | None = None
    """L_i, which X_i L_i in the place of X_i already holds; None is the identity"""
    group: ProcessGroup = ALONE
    """who holds the other experts, where X is a part of them"""

    def relfrob(self, error: float) -> float:
        return (error / self.total) ** 0.5 if self.total > 0 else 0.0

    def at(self, controls: Controls, *, temperature_factor: float = 1.0, coding: bool = False) -> StepOptions:
        """Return the options of one step: those of the whole fit with the scheduled values."""
        return replace(
            self.options.step,
            lam=controls.lam,
            beta=controls.beta,
            temperature=controls.temperature * temperature_factor,
            coding=coding,
            sparse=controls.phase is Phase.control,
        )


def cut_support(problem: Problem, state: AMState, controls: Controls) -> AMState:
    """Cut the codes to an entmax support whose median meets the target and refit them on it; spends `state`."""
    assert problem.sizes.target_support is not None
    support = support_of_median(
        problem.group.gather(state.atoms.codes),
        state.atoms.bank,
        median=problem.sizes.target_support,
        code_map=problem.options.step.code_map,
    )
    support = problem.group.own(support)
    options = replace(problem.at(controls), l1=0.0)
    return coding_step(problem.X, state, options, support=support, group=problem.group, spend=True)


def validation_relfrob(problem: Problem, state: AMState) -> float:
    """Return RelFrob with codes pruned, bank and codes rounded to the export dtype, and adapters refit."""
    dtype = problem.options.export_dtype
    codes = prune(state.atoms.codes, problem.options.prune)
    bank = state.atoms.bank
    if dtype is not None:
        codes, bank = codes.to(dtype).to(codes), bank.to(dtype).to(bank)
    elif not problem.group.any(not torch.equal(codes, state.atoms.codes)):
        return problem.relfrob(state.point.error)
    step = replace(problem.options.step, lam=state.lam)
    error = error_at(problem.X, bank, codes, step, metric=problem.metric, group=problem.group)
    return problem.relfrob(error)


def step_record(
    problem: Problem,
    running: Running,
    controls: Controls,
    figures: StepFigures,
    validation: float | None,
) -> StepRecord:
    """Return the record of the step that led to `running`; supports are those of the experts of all processes."""
    state, progress = running.state, running.progress
    support = problem.group.gather(support_sizes(state.atoms.codes)).double()
    return StepRecord(
        step=progress.step,
        seconds=progress.seconds,
        objective=state.objective,
        relfrob=problem.relfrob(state.point.error),
        validation_relfrob=validation,
        lam=controls.lam,
        beta=controls.beta,
        temperature=controls.temperature * progress.temperature_factor,
        accepted=figures.accepted,
        damping=state.damping,
        regularised_solves=progress.regularised,
        support_median=float(support.quantile(0.5)),
        support_mean=float(support.mean()),
        support_min=int(support.min()),
        support_max=int(support.max()),
        seconds_coding=figures.seconds_coding,
        seconds_dictionary=figures.seconds_dictionary,
        seconds_refit=figures.seconds_refit,
    )
