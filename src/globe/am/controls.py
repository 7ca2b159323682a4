"""What the schedules say at one moment of a fit, and the phases in which codes are made sparse.

Sparse codes early are a trap (atoms off the support see no gradient), so the first part of a fit is dense. Then the
temperature falls until the median support meets its target. Whatever the control has reached when the last part
begins, the support is cut to the target there, and the rest of the fit polishes on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from jaxtyping import Float
from torch import Tensor

from globe.am.records import Sizes
from globe.am.schedules import curve_value
from globe.config.schema import CurveConfig, ScheduleConfig, TrainConfig

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


def share_of_fit(train: TrainConfig, step: int, seconds: float) -> float:
    """Return how far a fit is, 0 to 1: by steps, or by time where that limit is nearer. The last step stands at 1."""
    share = step / (train.steps - 1) if train.steps > 1 else 1.0
    if train.time_limit is not None:
        share = max(share, seconds / train.time_limit)
    return min(share, 1.0)


def controls_at(schedule: ScheduleConfig, sizes: Sizes, share: float) -> Controls:
    """Return the scheduled values and the phase at a share of the fit."""
    curves = (schedule.lam, schedule.beta, schedule.temperature)
    lam, beta, temperature = (_value(curve, share) for curve in curves)
    phase = Phase.dense
    if sizes.target_support is not None and share >= CONTROL_FROM:
        phase = Phase.control if share < FREEZE_FROM else Phase.frozen
    ended = all(_value(curve, share) == _value(curve, 1.0) for curve in curves)
    held = sizes.target_support is None or phase is Phase.frozen
    return Controls(lam, beta, temperature, phase, ended and held)


def _value(curve: CurveConfig, share: float) -> float:
    return curve_value(curve.kind, curve.start, curve.end, share, 2, warmup=curve.warmup, hold=curve.hold)


def median_support(codes: Float[Tensor, "n m"]) -> float:
    """Return the median over experts of the atoms in use: the mean of the middle two for an even number of experts."""
    return float((codes > 0).sum(dim=1).double().cpu().quantile(0.5))
