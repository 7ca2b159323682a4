"""What a fit is told beside its experts and sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from globe.am.records import StepOptions
from globe.am.schedules import curve_value


@dataclass(frozen=True, slots=True)
class Curve:
    """The course of one number through a fit: the arguments of `curve_value`."""

    kind: str = "constant"
    start: float = 1.0
    end: float = 1.0
    warmup: float = 0.0
    hold: float = 0.0

    def at(self, share: float) -> float:
        """Return the value at a share of the fit, 0 to 1."""
        return curve_value(self.kind, self.start, self.end, share, 2, warmup=self.warmup, hold=self.hold)


@dataclass(frozen=True, slots=True)
class Start:
    """How a fit begins; see `seed_bank` and `first_codes`."""

    seeding: str = "aligned_svd"
    codes: str = "mixed"
    one_hot: float = 0.1
    concentration: float = 2.0
    scale: float = 0.25
    """standard deviation of the entries of the first mixed bases"""


@dataclass(frozen=True, slots=True)
class FitOptions:
    """The options of a whole fit."""

    step: StepOptions
    """scalars of every step; the schedules and the phase of the fit set lam, beta, temperature, coding and sparse"""
    start: Start = Start()
    lam: Curve = Curve()
    beta: Curve = Curve()
    temperature: Curve = Curve()
    curvature: str = "auto"
    """arithmetic of the conjugate gradients: auto, same or bfloat16; see `curvature_dtype`"""
    least_ridge: float = 0.0
    """what the ridge is not lowered below where a fit begins with a small error, as adapters of few bits need it"""
    damping: float = 1e-2
    """first damping of Levenberg and Marquardt"""
    simplex: bool = False
    """whether the codes of an expert sum to one"""
    coding_every: int = 5
    """steps between two coding steps; 0 makes none"""
    control_every: int = 5
    """steps between two corrections of the temperature"""
    eta: float = 0.05
    """gain of the temperature control"""
    prune: float = 1e-3
    """codes below this share of the expert's largest are zero in what is validated"""
    export_dtype: torch.dtype | None = None
    """dtype to which bank and codes are rounded for the validation error; None leaves them"""
    steps: int = 60
    time_limit: float | None = None
    """seconds"""
    evaluate_every: int = 5
    """steps between two validations"""
    patience: int = 4
    """validations without improvement before an early stop; 0 never stops early"""
    tolerance: float = 1e-4
    """relative improvement of the validation error that counts as one"""
    checkpoint_every: float = 60.0
    """seconds between two states that a fit can continue from"""
