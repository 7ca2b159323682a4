"""How a bank is fitted: the groups `init`, `schedule`, `codes` and `train`."""

from __future__ import annotations

from dataclasses import dataclass, field

from globe.config.checks import at_least_zero, check, positive
from globe.config.choices import CodeMap, CurvatureDtype, Curve, Dictionary, FirstCodes, Seeding


@dataclass
class InitConfig:
    seeding: Seeding = Seeding.aligned_svd
    """Method that makes the first atoms."""
    codes: FirstCodes = FirstCodes.mixed
    """First codes: dense mixtures, or the NNLS fit to the warm start (simplex: with codes that sum to one)."""
    one_hot: float = 0.1
    """Share of an expert's own atom in mixed first codes, 0 to 1."""
    concentration: float = 2.0
    """Dirichlet concentration of mixed first codes."""
    scale: float = 0.25
    """Standard deviation of the entries of the first mixed bases; small keeps a smooth phi nearly linear."""

    def __post_init__(self) -> None:
        check(0 <= self.one_hot <= 1, "init.one_hot", self.one_hot, "a number from 0 to 1")
        check(positive(self.concentration), "init.concentration", self.concentration, "a positive number")
        check(positive(self.scale), "init.scale", self.scale, "a positive number")


@dataclass
class CurveConfig:
    """The course of one number through a fit."""

    kind: Curve = Curve.constant
    """Shape of the way from start to end; constant stays at start."""
    start: float = 0.0
    """Value at the first step."""
    end: float = 0.0
    """Value at the last step."""
    warmup: float = 0.0
    """Share of all steps, 0 to 1, spent at `start` before the way begins."""
    hold: float = 0.0
    """Share of all steps, 0 to 1, spent at `end` after the way is done."""


@dataclass
class ScheduleConfig:
    lam: CurveConfig = field(default_factory=lambda: CurveConfig(start=1.0, end=1.0))
    """Homotopy of the activation: 0 linear, 1 phi. With a small `init.scale` phi is nearly linear at first anyway, so
    1 from the start costs little and ends lower."""
    beta: CurveConfig = field(default_factory=lambda: CurveConfig(start=1.0, end=1.0))
    """Blend of the dictionary target: 0 the aligned warm start, 1 weight-aware (the true objective)."""
    temperature: CurveConfig = field(default_factory=lambda: CurveConfig(start=1.0, end=1.0))
    """Temperature T of the code map; `codes.target_support` adds a control loop on top."""

    def __post_init__(self) -> None:
        for name in ("lam", "beta", "temperature"):
            _check_curve(f"schedule.{name}", getattr(self, name), share=name != "temperature")


def _check_curve(key: str, curve: CurveConfig, *, share: bool) -> None:
    """Check the curve of the schedule `key`; its numbers are shares from 0 to 1, or positive numbers."""
    for name in ("start", "end"):
        value = getattr(curve, name)
        if share:
            check(0 <= value <= 1, f"{key}.{name}", value, "a number from 0 to 1")
        else:
            check(positive(value), f"{key}.{name}", value, "a positive number")
        check(
            curve.kind is not Curve.exponential or value > 0,
            f"{key}.{name}",
            value,
            f"a positive number, which {key}.kind=exponential needs at both ends",
        )
    for name in ("warmup", "hold"):
        value = getattr(curve, name)
        check(0 <= value <= 1, f"{key}.{name}", value, "a share of the steps from 0 to 1")
    rest = 1 - curve.warmup
    check(curve.hold <= rest, f"{key}.hold", curve.hold, f"at most {rest:g}, what {key}.warmup leaves")


@dataclass
class CodesConfig:
    map: CodeMap = CodeMap.entmax15
    """Map from logits to the simplex; decides the support, least squares decides the values."""
    target_support: int | str | None = None
    """Median number of atoms an expert may use at the end: an integer, an expression in m; null, or more
    than there are atoms, is dense."""
    joint: bool = True
    """Move the codes together with the bank in the Gauss-Newton step."""
    every: int = 5
    """Steps between two coding steps, where the codes do not simply move with the bank: with joint=false, MOD, an L1
    penalty, and while the support is brought to its target. 0 makes none."""
    prune: float = 1e-3
    """Codes below this share of the expert's largest are set to zero."""
    eta: float = 0.05
    """Gain of the temperature control; outside 0.02 to 0.1 it is slow or oscillates."""
    control_every: int = 5
    """Steps between two corrections of the temperature."""
    l1: float = 0.0
    """L1 penalty on the codes, relative to the mean squared norm of the atoms' contributions."""
    simplex: bool = False
    """Constrain the codes of an expert to sum to one."""

    def __post_init__(self) -> None:
        check(self.every >= 0, "codes.every", self.every, "a number of steps of at least 0")
        check(
            self.control_every >= 1,
            "codes.control_every",
            self.control_every,
            "a number of steps of at least 1",
        )
        check(0 <= self.prune < 1, "codes.prune", self.prune, "a share from 0 to below 1")
        check(
            0 < self.eta <= 0.5, "codes.eta", self.eta, "a gain above 0 and at most 0.5 (0.02 to 0.1 is good)"
        )
        check(at_least_zero(self.l1), "codes.l1", self.l1, "a number of at least 0")
        check(
            not isinstance(self.target_support, int) or self.target_support >= 1,
            "codes.target_support",
            self.target_support,
            "an integer of at least 1, an expression such as m/2, or null",
        )


@dataclass
class TrainConfig:
    steps: int = 60
    """Largest number of steps: of alternating minimisation, or of Adam for the methods trained by it."""
    time_limit: float | None = None
    """Seconds after which a fit ends at the next step, per bank; null is no limit."""
    dictionary: Dictionary = Dictionary.gauss_newton
    """Method of the dictionary step."""
    cg_iterations: int = 40
    """Conjugate-gradient iterations of a Gauss-Newton step, at most."""
    cg_tolerance: float = 0.5
    """The iterations end after the j-th once it adds no more than cg_tolerance / j to the fall of the quadratic model:
    few in the first steps, many near a minimum. 0 makes all of them."""
    curvature_dtype: CurvatureDtype = CurvatureDtype.auto
    """Arithmetic of the conjugate gradients: that of the fit (same), bfloat16, or bfloat16 for experts of 2^15 numbers
    or more where the hardware multiplies it faster (auto). Gradients and the decision to take a step always use that
    of the fit."""
    damping: float = 1e-2
    """First Levenberg-Marquardt damping, relative to the preconditioner's mean diagonal."""
    momentum: float = 0.95
    """Largest Nesterov extrapolation between Gauss-Newton steps; 0 is none."""
    lambda_A: float = 1e-4
    """Largest relative ridge of the adapter refit. It keeps the mixed bases well conditioned, so that rounding the bank
    to bfloat16 costs less. A fit that begins with a relative error E takes at most 0.1 E^2. 0 fits exact problems
    exactly."""
    lambda_B: float = 0.0
    """Relative ridge of the dictionary step."""
    lambda_T: float = 0.0
    """Relative ridge of the weight-aware targets."""
    evaluate_every: int = 5
    """Steps between two validations, which measure the error after pruning in the export dtype."""
    patience: int = 4
    """Validations without improvement, with a stable support, before an early stop; 0 never stops early."""
    tolerance: float = 1e-4
    """Relative improvement of the validation error that counts as one."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints of a running fit; 0 writes one after every step."""

    def __post_init__(self) -> None:
        check(self.steps >= 1, "train.steps", self.steps, "an integer of at least 1")
        limit = self.time_limit
        check(limit is None or limit > 0, "train.time_limit", limit, "seconds above 0, or null for no limit")
        check(self.cg_iterations >= 1, "train.cg_iterations", self.cg_iterations, "an integer of at least 1")
        check(positive(self.damping), "train.damping", self.damping, "a positive number")
        check(0 <= self.momentum < 1, "train.momentum", self.momentum, "a number from 0 to below 1")
        for key in ("lambda_A", "lambda_B", "lambda_T", "checkpoint_every", "tolerance", "cg_tolerance"):
            value = getattr(self, key)
            check(at_least_zero(value), f"train.{key}", value, "a number of at least 0")
        check(
            self.evaluate_every >= 1, "train.evaluate_every", self.evaluate_every, "an integer of at least 1"
        )
        check(self.patience >= 0, "train.patience", self.patience, "an integer of at least 0")
