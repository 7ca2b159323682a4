"""The configuration: one dataclass per group, registered with Hydra's ConfigStore. Values live in `conf/`.

Nothing here imports torch. `__post_init__` only checks (it can run more than once); sizes that depend on the
checkpoint (`n/4`, `3p/4`) stay text here and are resolved once by `globe.fit.plan`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from globe.config.bank_options import BankConfig, BudgetConfig, ModelConfig, NormaliseConfig, ServeConfig
from globe.config.calibrate_options import CalibrateConfig
from globe.config.checks import check, positive
from globe.config.choices import (
    ADAM_METHODS,
    FAMILIES_OF,
    OBJECTIVES,
    WEIGHT_METHODS,
    Activation,
    Curve,
    Device,
    Dictionary,
    ExportDtype,
    Family,
    FitDtype,
    Method,
    Metric,
    Over,
    Scale,
    Scope,
    Store,
    WandbMode,
)
from globe.config.fit_options import CodesConfig, InitConfig, ScheduleConfig, TrainConfig
from globe.errors import ConfigError

MOST_THREADS = 1024


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.disabled
    """disabled never imports wandb; offline writes beside the run and asks for nothing; online needs a key."""
    project: str = "globe"
    """Project that the runs belong to."""
    entity: str | None = None
    """Team or user; null is the default of the account."""
    group: str | None = None
    """Group of the run in wandb; null is the name of the sweep."""
    job_type: str = "train"
    """Job type under which wandb lists the run."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run, to find it by."""
    log_every: int = 1
    """Steps between two logged points."""
    log_artifact: bool = False
    """Also log the finished banks (bank.safetensors and globe.json) as wandb artefacts of type bank."""
    patience: float = 30.0
    """Seconds that the end of a run waits for wandb to take what it was told; no step ever waits for it."""

    def __post_init__(self) -> None:
        check(positive(self.patience), "wandb.patience", self.patience, "a positive number of seconds")
        check(self.log_every >= 1, "wandb.log_every", self.log_every, "an integer of at least 1")


@dataclass
class Config:
    family: Family = Family.up
    """Which projection is compressed: up, gate, down, both (up and gate) or all three; one bank each, unless
    `bank.scope` joins them. A bank of down stands on its output side: its matrices are read transposed."""
    layer: Any = None
    """Layers: `12`, `all`, `[4,12,20]`, or `4-8` (both ends included; `4:8` and `4..8` are the same); null is the
    middle one of those that have experts."""
    method: Method = Method.globe
    """Method that approximates the experts: a GloBE bank, or one it is measured against, with the same budget."""
    seed: int = 0
    """Seed of every random draw, bank by bank: which other banks a run has makes no difference."""
    device: Device = Device.auto
    """Device that fits run on; auto is a CUDA device where there is one, else the CPU."""
    dtype: FitDtype = FitDtype.float32
    """Dtype that the fit calculates in."""
    export_dtype: ExportDtype = ExportDtype.auto
    """Dtype of the exported factors; auto is the checkpoint's own."""
    deterministic: bool = False
    """Use only deterministic kernels; slower on a GPU, no difference on a CPU."""
    threads: int | None = None
    """CPU threads; null is one for small banks and otherwise leaves the number to PyTorch."""
    output: str = "outputs"
    """Folder in which runs make their folders."""
    sweep: str = "sweep"
    """Name of the folder that holds the runs of a multirun."""
    S_cache: int | str = "all"
    """Experts per layer and family whose mixed bases stay composed in the patched model: an integer, 0 for none, or
    all. No part of a fit: runs that differ in it alone share one. `globe.patch` and `globe.evaluate` take it from the
    run where they are given none."""
    objectives: list[str] = field(default_factory=lambda: ["relfrob"])
    """Figures that a sweeper minimises: some of relfrob, kept, kept_model and seconds."""
    overwrite: bool = False
    """Repeat a run that has finished instead of reporting it."""
    dry_run: bool = False
    """Predict sizes, memory and time of every bank and fit nothing. (`--dry_run` would be an option of Hydra.)"""
    model: ModelConfig = field(default_factory=ModelConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    init: InitConfig = field(default_factory=InitConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        check(self.seed >= 0, "seed", self.seed, "an integer of at least 0")
        check(self.seed < 2**63, "seed", self.seed, "an integer below 2**63")
        threads = self.threads
        counted = threads is None or 1 <= threads <= MOST_THREADS
        check(counted, "threads", threads, f"an integer of at least 1 and at most {MOST_THREADS}, or null")
        check(bool(self.output.strip()), "output", self.output, "the folder that holds the runs")
        one_folder = bool(self.sweep.strip(". ")) and not re.search(r"[/\\]", self.sweep)
        check(one_folder, "sweep", self.sweep, "a folder name without a slash")
        cache = self.S_cache
        possible = cache == "all" if isinstance(cache, str) else cache >= 0
        check(possible, "S_cache", cache, "a number of experts of at least 0, or all")
        known = bool(self.objectives) and set(self.objectives) <= set(OBJECTIVES)
        check(known, "objectives", self.objectives, f"one or more of {', '.join(OBJECTIVES)}")
        _check_method(self)


def _check_method(config: Config) -> None:
    """Refuse options of different groups that contradict each other."""
    bank, method = config.bank, config.method
    if bank.atom_rank is not None and method in (Method.group_svd, Method.mobe, Method.mobe_corrected):
        raise ConfigError(
            f"bank.atom_rank is not possible with method={method}, whose atoms are dense: leave it out"
        )
    sized = bank.size is not None or config.model.size is not None
    if sized:
        _check_size(config)
    coded = not bank.coded or sized or bank.bits is not None or bank.bits_A is not None
    check(coded, "bank.coded", True, "false, or bank.bits, bank.size or model.size with it")
    if config.serve.limited:
        check(method is Method.globe, "serve", "limits", f"without limits with method={method}")
        check(not sized, "bank.size", bank.size, "null with limits of serve; give bank.kept or sizes")
    if method is Method.globe:
        dense_only = config.train.dictionary is Dictionary.mod and bank.atom_rank is not None
        check(not dense_only, "train.dictionary", "mod", "gauss_newton, or dense atoms (bank.atom_rank=null)")
    else:
        support = config.codes.target_support
        check(
            support is None,
            "codes.target_support",
            support,
            f"null with method={method}, which has no control",
        )
    if method in WEIGHT_METHODS:
        _check_weight_method(config)
    if method in ADAM_METHODS:
        published = (Activation.silu, Activation.tanh, Activation.identity)
        allowed = f"{', '.join(published)} with method={method}"
        check(bank.activation in published, "bank.activation", str(bank.activation), allowed)
    if config.normalise.store is Store.checkpoint:
        plain = chosen_metric(config) is Metric.none
        needed = "fit, or method=globe and normalise.metric=none"
        check(method is Method.globe and plain, "normalise.store", "checkpoint", needed)
    if config.normalise.metric is Metric.inputs and config.calibrate.text is None:
        raise ConfigError(
            "normalise.metric=inputs needs a text: give calibrate.text=FILE or calibrate.text=embedded, or take "
            "normalise.metric=experts, which needs none"
        )
    if config.budget.over is Over.model:
        given = bank.kept is not None or (sized and (bank.m is not None or method in WEIGHT_METHODS))
        check(given, "budget.over", "model", "bank.kept, or bank.size, bank.m and bank.r, with it")
        check(bank.scope is Scope.family, "bank.scope", str(bank.scope), "family with budget.over=model")
    if bank.scope is Scope.families:
        check(
            config.family in FAMILIES_OF,
            "bank.scope",
            "families",
            "family=both or family=all with it, whose banks it joins",
        )
    if method is Method.mean_svd:
        check(bank.scope is Scope.family, "bank.scope", str(bank.scope), "family with method=mean_svd")
        one = config.normalise.scale in (Scale.family, Scale.none)
        check(one, "normalise.scale", str(config.normalise.scale), "family or none with method=mean_svd")


def _check_size(config: Config) -> None:
    """Refuse what contradicts a budget in bytes."""
    bank, method, size = config.bank, config.method, config.model.size
    possible = method is Method.globe or (size is None and method in (Method.gptq, Method.gptq_rotated))
    name, value = ("bank.size", bank.size) if size is None else ("model.size", size)
    check(possible, name, value, f"null with method={method}")
    support = config.codes.target_support
    check(support is None, "codes.target_support", support, f"null with {name}, or sizes instead")
    if size is None:
        return
    for key in ("size", "kept", "bits", "bits_A", "bits_B", "atom_rank"):
        other = getattr(bank, key)
        check(other is None, f"bank.{key}", other, "null with model.size, which says what banks may take")
    if (bank.m is None) != (bank.r is None):
        raise ConfigError(f"model.size={size} takes bank.m and bank.r, and chooses their bits, or neither")


def _check_weight_method(config: Config) -> None:
    bank, method = config.bank, config.method
    bits = bank.bits if bank.bits_A is None else bank.bits_A
    whole = bits is not None and bits == int(bits)
    check(whole or bank.size is not None, "bank.bits", bits, f"an integer from 1 to 8 with method={method}")
    for key in ("m", "r", "atom_rank", "kept", "bits_B"):
        value = getattr(bank, key)
        check(value is None, f"bank.{key}", value, f"null with method={method}, which rounds all weights")
    blind = method is not Method.rtn and chosen_metric(config) is Metric.none
    needed = f"one of the others with method={method}, which feeds errors back in a metric"
    check(not blind, "normalise.metric", "none", needed)


def chosen_metric(config: Config) -> Metric:
    """Return the metric that errors count in: none, experts or inputs."""
    if config.normalise.metric is not Metric.auto:
        return config.normalise.metric
    if config.calibrate.text is not None:
        return Metric.inputs
    # without a metric there is nothing to feed errors back in
    return Metric.experts if config.method in (Method.gptq, Method.gptq_rotated) else Metric.none


def is_linear(config: Config) -> bool:
    """Return whether phi is the identity throughout the fit."""
    lam = config.schedule.lam
    never = lam.start == 0 and (lam.end == 0 or lam.kind is Curve.constant)
    closed = config.method is not Method.globe and config.method not in ADAM_METHODS
    return (
        closed or config.bank.activation is Activation.identity or (config.method is Method.globe and never)
    )
