"""The configuration: one dataclass per group, registered with Hydra's ConfigStore. Values live in `conf/`.

Nothing here imports torch. `__post_init__` only checks (it can run more than once); sizes that depend on the
checkpoint (`n/4`, `3p/4`) stay text here and are resolved once by `globe.fit.plan`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from globe.config.choices import (
    ADAM_METHODS,
    OBJECTIVES,
    Activation,
    Centre,
    CodeMap,
    CurvatureDtype,
    Curve,
    Device,
    Dictionary,
    ExportDtype,
    Family,
    FirstCodes,
    FitDtype,
    Method,
    Metric,
    SampleMethod,
    Scale,
    Scope,
    Seeding,
    Store,
    WandbMode,
)
from globe.errors import ConfigError


def _check(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value!r} is not possible: give {allowed}")


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _at_least_zero(value: float) -> bool:
    return 0 <= value < math.inf


@dataclass
class ModelConfig:
    path: str | None = None
    """Checkpoint directory or Hugging Face hub id; null is the embedded model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null is the default branch."""
    force_download: bool = False
    """Download again even if the hub cache has the files."""
    include_shared: bool = False
    """Also take the always-on shared expert; refused where it is not of the size of a routed one."""
    max_experts: int | None = None
    """Use at most this many routed experts per layer; null is all."""
    sample_method: SampleMethod = SampleMethod.first_n
    """Which experts `max_experts` keeps."""

    def __post_init__(self) -> None:
        _check(
            self.max_experts is None or self.max_experts >= 2,
            "model.max_experts",
            self.max_experts,
            "an integer of at least 2, or null for all experts",
        )
        _check(
            self.path is None or bool(self.path.strip()),
            "model.path",
            self.path,
            "a folder, a hub id or null",
        )


@dataclass
class NormaliseConfig:
    centre: Centre = Centre.scalar
    """What is subtracted and stored as an exact constant: nothing, one number, or the p x d mean expert."""
    scale: Scale = Scale.family
    """What is divided out and folded into the adapters: nothing, or one std per family, expert or row."""
    metric: Metric = Metric.none
    """How the columns of an error count: all alike, or by the second moment of the experts' rows, which lean to the
    directions that inputs have. The latter costs RelFrob and gains perplexity; a linear phi is fitted in that metric,
    with a curved one the last refit of the adapters is."""
    store: Store = Store.fit
    """How the experts are held during a fit: normalised, in the dtype of the fit, or as in the checkpoint, normalised
    anew whenever they are read. For a bfloat16 checkpoint the latter halves their memory; the numbers are the same."""


@dataclass
class BankConfig:
    m: int | str | None = None
    """Number of atoms: an integer or an expression in n, the number of experts that share the bank; null is n/4."""
    r: int | str | None = None
    """Rows of an atom: an integer or an expression in p or d, the rows and columns of an expert; null is p/2."""
    atom_rank: int | str | None = None
    """k of low-rank atoms B_j = U_j V_j, which keep k (r + d) numbers each: an integer or an expression in r, p or
    d; null is dense atoms."""
    kept: float | None = None
    """Share of the experts' own parameters to keep at most, 0 to 1: chooses m, r and the atom rank, those of a GloBE
    bank by short fits (see `budget`); null takes the sizes above."""
    scope: Scope = Scope.family
    """Whose experts share a bank: family is those of one layer and family, families is up and gate of a layer,
    layers is all selected layers, per family."""
    activation: Activation = Activation.silu
    """phi; blended in by `schedule.lam` (0 is linear whatever stands here)."""

    def __post_init__(self) -> None:
        for key in ("m", "r", "atom_rank"):
            value = getattr(self, key)
            _check(not isinstance(value, int) or value >= 1, f"bank.{key}", value, "an integer of at least 1")
        kept = self.kept
        _check(kept is None or 0 < kept <= 1, "bank.kept", kept, "a share above 0 and at most 1, or null")
        given = [f"bank.{key}" for key in ("m", "r", "atom_rank") if getattr(self, key) is not None]
        if kept is not None and given:
            raise ConfigError(
                f"bank.kept={kept} sets the sizes of the method: leave out {' and '.join(given)}"
            )


@dataclass
class BudgetConfig:
    """The search for sizes that `bank.kept` asks for, once for each shape of bank."""

    seconds: float = 10.0
    """What the short fits may take together on one core of the reference machine (see `globe.sizes.costs`); turned
    into a
    number of steps beforehand, so that equal seeds choose equal sizes on any machine."""

    def __post_init__(self) -> None:
        _check(_positive(self.seconds), "budget.seconds", self.seconds, "a positive number")


@dataclass
class InitConfig:
    seeding: Seeding = Seeding.aligned_svd
    """How the first atoms are made."""
    codes: FirstCodes = FirstCodes.mixed
    """First codes: dense mixtures, or the NNLS (optionally simplex) fit to the warm start."""
    one_hot: float = 0.1
    """Share of an expert's own atom in mixed first codes, 0 to 1."""
    concentration: float = 2.0
    """Dirichlet concentration of mixed first codes."""
    scale: float = 0.25
    """Standard deviation of the entries of the first mixed bases; small keeps a smooth phi nearly linear."""

    def __post_init__(self) -> None:
        _check(0 <= self.one_hot <= 1, "init.one_hot", self.one_hot, "a number from 0 to 1")
        _check(_positive(self.concentration), "init.concentration", self.concentration, "a positive number")
        _check(_positive(self.scale), "init.scale", self.scale, "a positive number")


@dataclass
class CurveConfig:
    """How one number goes through a fit."""

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
    that 1 from the start costs little and ends lower (0.352 against 0.354 in 60 steps on a trained layer)."""
    beta: CurveConfig = field(default_factory=lambda: CurveConfig(start=1.0, end=1.0))
    """Blend of the dictionary target: 0 the aligned warm start, 1 weight-aware (the true objective)."""
    temperature: CurveConfig = field(default_factory=lambda: CurveConfig(start=1.0, end=1.0))
    """Temperature T of the code map; `codes.target_support` adds a control loop on top."""

    def __post_init__(self) -> None:
        for name in ("lam", "beta", "temperature"):
            _check_curve(f"schedule.{name}", getattr(self, name), share=name != "temperature")


def _check_curve(key: str, curve: CurveConfig, *, share: bool) -> None:
    """A curve does not know which schedule it is; its owner does, so that the message can name the key."""
    for name in ("start", "end"):
        value = getattr(curve, name)
        if share:
            _check(0 <= value <= 1, f"{key}.{name}", value, "a number from 0 to 1")
        else:
            _check(_positive(value), f"{key}.{name}", value, "a positive number")
        _check(
            curve.kind is not Curve.exponential or value > 0,
            f"{key}.{name}",
            value,
            f"a positive number, which {key}.kind=exponential needs at both ends",
        )
    for name in ("warmup", "hold"):
        value = getattr(curve, name)
        _check(0 <= value <= 1, f"{key}.{name}", value, "a share of the steps from 0 to 1")
    rest = 1 - curve.warmup
    _check(curve.hold <= rest, f"{key}.hold", curve.hold, f"at most {rest:g}, what {key}.warmup leaves")


@dataclass
class CodesConfig:
    map: CodeMap = CodeMap.entmax15
    """Map from logits to the simplex; decides the support, least squares decides the values."""
    target_support: int | str | None = None
    """Median number of atoms an expert may use at the end: an integer, an expression in m; null is dense."""
    joint: bool = True
    """Move the codes together with the bank in the Gauss-Newton step."""
    every: int = 5
    """A coding step every so many steps, where the codes do not simply move with the bank: with joint=false, MOD, an
    L1 penalty, and while the support is brought to its target. 0 makes none."""
    prune: float = 1e-3
    """Codes below this share of the expert's largest are set to zero."""
    eta: float = 0.05
    """Gain of the temperature control; outside 0.02 to 0.1 it is slow or oscillates."""
    control_every: int = 5
    """Temperature control every so many steps."""
    l1: float = 0.0
    """L1 penalty on the codes, relative to the mean squared norm of the atoms' contributions."""
    simplex: bool = False
    """Constrain the codes of an expert to sum to one."""

    def __post_init__(self) -> None:
        _check(self.every >= 0, "codes.every", self.every, "a number of steps of at least 0")
        _check(
            self.control_every >= 1,
            "codes.control_every",
            self.control_every,
            "a number of steps of at least 1",
        )
        _check(0 <= self.prune < 1, "codes.prune", self.prune, "a share from 0 to below 1")
        _check(
            0 < self.eta <= 0.5, "codes.eta", self.eta, "a gain above 0 and at most 0.5 (0.02 to 0.1 is good)"
        )
        _check(_at_least_zero(self.l1), "codes.l1", self.l1, "a number of at least 0")
        _check(
            not isinstance(self.target_support, int) or self.target_support >= 1,
            "codes.target_support",
            self.target_support,
            "an integer of at least 1, an expression such as m/2, or null",
        )


@dataclass
class TrainConfig:
    steps: int = 60
    """Steps at most: of alternating minimisation, or of Adam for the methods trained by it."""
    time_limit: float | None = None
    """Seconds after which a fit ends at the next step, per bank; null is no limit."""
    dictionary: Dictionary = Dictionary.gauss_newton
    """Dictionary step."""
    cg_iterations: int = 40
    """Conjugate-gradient iterations of a Gauss-Newton step, at most."""
    cg_tolerance: float = 0.5
    """They end after iteration j once it adds no more than cg_tolerance / j to the fall of the quadratic model: few in
    the first steps, many near a minimum. 0 makes all of them."""
    curvature_dtype: CurvatureDtype = CurvatureDtype.auto
    """Arithmetic inside the conjugate gradients: the fit's own, bfloat16, or bfloat16 for experts of 2^15 numbers or
    more where the hardware multiplies it faster (auto). Gradients and the decision to take a step are always in the
    fit's own."""
    damping: float = 1e-2
    """First Levenberg-Marquardt damping, relative to the preconditioner's mean diagonal."""
    momentum: float = 0.95
    """Largest Nesterov extrapolation between Gauss-Newton steps; 0 is none."""
    lambda_A: float = 1e-4
    """Relative ridge of the adapter refit. It keeps the mixed bases well conditioned; without it, rounding the bank
    to bfloat16 costs more (0.3607 against 0.3512 on a trained layer after 60 steps). 0 fits exact problems exactly."""
    lambda_B: float = 0.0
    """Relative ridge of the dictionary step."""
    lambda_T: float = 0.0
    """Relative ridge of the weight-aware targets."""
    evaluate_every: int = 5
    """Validation (the error after pruning, in the export dtype) every so many steps."""
    patience: int = 4
    """Validations without improvement, with a stable support, before an early stop; 0 never stops early."""
    tolerance: float = 1e-4
    """Relative improvement of the validation error that counts as one."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints of a running fit; 0 writes one after every step."""

    def __post_init__(self) -> None:
        _check(self.steps >= 1, "train.steps", self.steps, "an integer of at least 1")
        limit = self.time_limit
        _check(limit is None or limit > 0, "train.time_limit", limit, "seconds above 0, or null for no limit")
        _check(self.cg_iterations >= 1, "train.cg_iterations", self.cg_iterations, "an integer of at least 1")
        _check(_positive(self.damping), "train.damping", self.damping, "a positive number")
        _check(0 <= self.momentum < 1, "train.momentum", self.momentum, "a number from 0 to below 1")
        for key in ("lambda_A", "lambda_B", "lambda_T", "checkpoint_every", "tolerance", "cg_tolerance"):
            value = getattr(self, key)
            _check(_at_least_zero(value), f"train.{key}", value, "a number of at least 0")
        _check(
            self.evaluate_every >= 1, "train.evaluate_every", self.evaluate_every, "an integer of at least 1"
        )
        _check(self.patience >= 0, "train.patience", self.patience, "an integer of at least 0")


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.disabled
    """disabled never imports wandb; offline writes beside the run, asks for nothing; online needs a key."""
    project: str = "globe"
    """Project that the runs belong to."""
    entity: str | None = None
    """Team or user; null is the default of the account."""
    group: str | None = None
    """Null is the sweep's name."""
    job_type: str = "train"
    """Under what wandb lists the run within its group."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run, to find it by."""
    log_every: int = 1
    """Steps between two logged points."""
    log_artifact: bool = False
    """Also log the finished banks (bank.safetensors and globe.json) as wandb artefacts of type bank."""
    patience: float = 30.0
    """Seconds that the end of a run waits for wandb to take what it was told; no step ever waits for it."""

    def __post_init__(self) -> None:
        _check(_positive(self.patience), "wandb.patience", self.patience, "a positive number of seconds")
        _check(self.log_every >= 1, "wandb.log_every", self.log_every, "an integer of at least 1")


@dataclass
class Config:
    family: Family = Family.up
    """Which projection: up, gate, or both (one bank each, unless `bank.scope` joins them)."""
    layer: Any = 12
    """Layers: `12`, `all`, `[4,12,20]`, or `4-8` (both ends included; `4:8` and `4..8` are the same)."""
    method: Method = Method.globe
    """What approximates the experts: a GloBE bank, or a method it is measured against, with the same budget."""
    seed: int = 0
    """Decides every random draw, bank by bank: which other banks a run has makes no difference."""
    device: Device = Device.auto
    """Where fits run; auto is a CUDA device where there is one, else the CPU."""
    dtype: FitDtype = FitDtype.float32
    """Arithmetic of the fit."""
    export_dtype: ExportDtype = ExportDtype.auto
    """Dtype of the exported factors; auto is the checkpoint's own."""
    deterministic: bool = False
    """Use only deterministic kernels; slower on a GPU, no difference on a CPU."""
    threads: int | None = None
    """CPU threads; null is one for small banks and otherwise leaves the number to PyTorch."""
    output: str = "outputs"
    """Folder that holds the run folders."""
    sweep: str = "sweep"
    """Name of the folder that holds the runs of a multirun."""
    S_cache: int | str = "all"
    """Experts per layer and family whose mixed bases stay composed in the patched model: an integer, 0 for none, or
    all. No part of a fit: runs that differ in it alone share one. `globe.patch` and `globe.evaluate` take it from the
    run where they are given none."""
    objectives: list[str] = field(default_factory=lambda: ["relfrob"])
    """What a run returns to a sweeper that minimises: out of relfrob, kept, kept_model and seconds."""
    overwrite: bool = False
    """Repeat a run that has finished instead of reporting it."""
    dry_run: bool = False
    """Predict sizes, memory and time of every bank, and fit nothing. (Two dashes before it would make it Hydra's.)"""
    model: ModelConfig = field(default_factory=ModelConfig)
    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    init: InitConfig = field(default_factory=InitConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _check(self.seed >= 0, "seed", self.seed, "an integer of at least 0")
        _check(self.seed < 2**63, "seed", self.seed, "an integer below 2**63")
        threads = self.threads
        _check(threads is None or threads >= 1, "threads", threads, "an integer of at least 1, or null")
        _check(bool(self.output.strip()), "output", self.output, "the folder that holds the runs")
        one_folder = bool(self.sweep.strip(". ")) and not re.search(r"[/\\]", self.sweep)
        _check(one_folder, "sweep", self.sweep, "a folder name without a slash")
        cache = self.S_cache
        possible = cache == "all" if isinstance(cache, str) else cache >= 0
        _check(possible, "S_cache", cache, "a number of experts of at least 0, or all")
        known = bool(self.objectives) and set(self.objectives) <= set(OBJECTIVES)
        _check(known, "objectives", self.objectives, f"one or more of {', '.join(OBJECTIVES)}")
        _check_method(self)


def _check_method(config: Config) -> None:
    """What one group of options makes of another."""
    bank, method = config.bank, config.method
    if bank.atom_rank is not None and method in (Method.group_svd, Method.mobe, Method.mobe_corrected):
        raise ConfigError(
            f"bank.atom_rank is not possible with method={method}, whose atoms are dense: leave it out"
        )
    if method is Method.globe:
        dense_only = config.train.dictionary is Dictionary.mod and bank.atom_rank is not None
        _check(
            not dense_only, "train.dictionary", "mod", "gauss_newton, or dense atoms (bank.atom_rank=null)"
        )
    else:
        support = config.codes.target_support
        _check(
            support is None,
            "codes.target_support",
            support,
            f"null with method={method}, which has no control",
        )
    if method in ADAM_METHODS:
        published = (Activation.silu, Activation.tanh, Activation.identity)
        allowed = f"{', '.join(published)} with method={method}"
        _check(bank.activation in published, "bank.activation", str(bank.activation), allowed)
        curved = config.normalise.metric is Metric.experts and not is_linear(config)
        needed = f"none, or bank.activation=identity, with method={method}"
        _check(not curved, "normalise.metric", "experts", needed)
    if config.normalise.store is Store.checkpoint:
        writes = config.normalise.metric is Metric.experts and is_linear(config)
        needed = "fit, or method=globe and, where phi is linear, normalise.metric=none"
        _check(method is Method.globe and not writes, "normalise.store", "checkpoint", needed)
    if bank.scope is Scope.families:
        _check(
            config.family is Family.both,
            "bank.scope",
            "families",
            "family=both with it, whose banks it joins",
        )
    if method is Method.mean_svd:
        _check(bank.scope is Scope.family, "bank.scope", str(bank.scope), "family with method=mean_svd")
        one = config.normalise.scale in (Scale.family, Scale.none)
        _check(one, "normalise.scale", str(config.normalise.scale), "family or none with method=mean_svd")


def is_linear(config: Config) -> bool:
    """Whether phi is the identity throughout the fit."""
    lam = config.schedule.lam
    never = lam.start == 0 and (lam.end == 0 or lam.kind is Curve.constant)
    closed = config.method is not Method.globe and config.method not in ADAM_METHODS
    return (
        closed or config.bank.activation is Activation.identity or (config.method is Method.globe and never)
    )
