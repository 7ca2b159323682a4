"""What the schedules say at one moment of a fit, and the phases in which codes are made sparse.

Sparse codes early are a trap (atoms off the support see no gradient), so the first part of a fit is dense. Then the
temperature falls until the median support meets its target. Whatever the control has reached when the last part
begins, the support is cut to the target there, and the rest of the fit polishes on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from globe.am.options import FitOptions
from globe.am.records import Sizes

CONTROL_FROM, FREEZE_FROM = 0.3, 0.7
"""Shares of a fit at which the control and the frozen phase begin, when there is a target."""


class Phase(StrEnum):
    dense = "dense"
    control = "control"
    frozen = "frozen"


@dataclass(frozen=True, slots=True)
class Controls:
    """The scheduled values of one step."""

    lam: float
    beta: float
    temperature: float
    phase: Phase
    final: bool
    """whether all schedules stand at their ends and the support is the one to keep, so that the fit may stop early"""


def share_of_fit(options: FitOptions, step: int, seconds: float) -> float:
    """Return how far a fit is, 0 to 1: by steps, or by time where that limit is nearer. The last step stands at 1."""
    share = step / (options.steps - 1) if options.steps > 1 else 1.0
    if options.time_limit is not None:
        share = max(share, seconds / options.time_limit)
    return min(share, 1.0)


def controls_at(options: FitOptions, sizes: Sizes, share: float) -> Controls:
    """Return the scheduled values and the phase at a share of the fit."""
    curves = (options.lam, options.beta, options.temperature)
    lam, beta, temperature = (curve.at(share) for curve in curves)
    phase = Phase.dense
    if sizes.target_support is not None and share >= CONTROL_FROM:
        phase = Phase.control if share < FREEZE_FROM else Phase.frozen
    ended = all(curve.at(share) == curve.at(1.0) for curve in curves)
    held = sizes.target_support is None or phase is Phase.frozen
    return Controls(lam, beta, temperature, phase, ended and held)
