"""One call for every baseline: the same experts, the same budget, the same result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import StopReason
from globe.am.refit import refit as least_squares
from globe.bank.compose import mixed_bases
from globe.baselines import mobe, slbf
from globe.baselines.adam import AdamOutcome, Limits, load_optimiser, minimise
from globe.baselines.budget import resolve_sizes
from globe.baselines.gauge import gauge_fix
from globe.baselines.group_svd import group_svd
from globe.baselines.in_metric import group_svd_in_metric, mean_svd_in_metric, svd_in_metric
from globe.baselines.linear import LinearFactors
from globe.baselines.mean_svd import mean_svd
from globe.baselines.records import BaselinePoint, BaselineResult, BaselineSizes
from globe.baselines.shared_basis import shared_basis
from globe.baselines.svd import svd
from globe.config.choices import ADAM_METHODS, Method
from globe.errors import ConfigError
from globe.numerics.figures import relfrob, squared_errors, squared_norms
from globe.numerics.input_metric import InputMetric


@torch.no_grad()
def run_baseline(
    method: Method | str,
    experts: Float[Tensor, "n p d"],
    *,
    budget: float | int | None = None,
    m: int | None = None,
    r: int | None = None,
    atom_rank: int | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    activation: str = "silu",
    weights_std: float | None = None,
    learning_rate: float | None = None,
    refit: bool = False,
    generator: torch.Generator | None = None,
    metric: InputMetric | None = None,
    on_step: Callable[[BaselinePoint], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> BaselineResult:
    """Approximates normalised experts X (n, p, d) by `method` within a budget.

    budget          share of n p d (float) or number of parameters (int) to keep at most; what sizes are not
                    given follow from it
    m, r, atom_rank sizes, where the method has them; see `resolve_sizes`
    steps, seconds  limits of the Adam methods, which need at least one; closed forms take neither
    activation      of the Adam methods: silu, tanh, identity
    weights_std     for `mobe` alone, and needed there: the standard deviation of the weights before
                    normalisation, which its published start depends on
    learning_rate   other than the published one; SLBF's atoms keep their ratio to it
    refit           refit the adapters by least squares at the end; the label gains `+refit`
    generator       lets `group_svd` and `mobe_corrected` try random groups besides consecutive ones
    metric          how errors count; experts are D_i X_i L_i then, and so are adapters D_i A_i and all errors
    on_step         called with every measured state
    clock           what counts as seconds; `time.process_time` for one thread on a machine with other work

    Equal inputs, generator state and `steps` give equal results; a time limit does not. Raises ConfigError
    for impossible sizes or missing limits, FitError where nothing finite comes out.
    """
    method = Method(method)
    n, p, d = experts.shape
    sizes = resolve_sizes(method, n=n, p=p, d=d, budget=budget, m=m, r=r, atom_rank=atom_rank)
    if method in ADAM_METHODS:
        if steps is None and seconds is None:
            raise ConfigError(f"{method} runs until a limit: give steps or seconds")
        load_optimiser()
    limits = Limits(clock(), steps, seconds, on_step, clock=clock)
    match method:
        case Method.mobe | Method.mobe_corrected:
            result = _run_mobe(
                experts, sizes, limits, activation, weights_std, learning_rate, generator, metric
            )
        case Method.slbf:
            result = _run_slbf(experts, sizes, limits, activation, learning_rate, metric)
        case _:
            result = _run_closed_form(experts, sizes, limits, generator, metric)
    return refit_adapters(result, experts, metric) if refit else result


def _run_closed_form(
    X: Float[Tensor, "n p d"],
    sizes: BaselineSizes,
    limits: Limits,
    generator: torch.Generator | None,
    metric: InputMetric | None,
) -> BaselineResult:
    if metric is None:
        factors = _plain_closed_form(X, sizes, generator)
    else:
        factors = _closed_form_in_metric(X, sizes, generator, metric)
    seconds = limits.elapsed()
    B, codes, A, mean = factors
    M = mixed_bases(codes, B, lam=0.0, activation="identity")
    point = BaselinePoint(0, seconds, _error(X, A, M, mean, metric))
    if limits.on_step:
        limits.on_step(point)
    return BaselineResult(
        sizes=sizes,
        label=str(sizes.method),
        bank=B,
        atoms_left=None,
        atoms_right=None,
        codes=codes,
        adapters=A,
        mean=mean,
        activation="identity",
        lam=0.0,
        relfrob=point.relfrob,
        history=(point,),
        stop=StopReason.closed_form,
    )


def _plain_closed_form(
    X: Float[Tensor, "n p d"], sizes: BaselineSizes, generator: torch.Generator | None
) -> LinearFactors:
    match sizes.method:
        case Method.svd:
            return svd(X, r=sizes.r)
        case Method.shared_basis:
            return shared_basis(X, r=sizes.r)
        case Method.mean_svd:
            return mean_svd(X, r=sizes.r)
        case _:
            return group_svd(X, m=sizes.m, r=sizes.r, generator=generator)


def _closed_form_in_metric(
    X: Float[Tensor, "n p d"], sizes: BaselineSizes, generator: torch.Generator | None, metric: InputMetric
) -> LinearFactors:
    match sizes.method:
        case Method.svd:
            return svd_in_metric(X, metric, r=sizes.r)
        case Method.mean_svd:
            return mean_svd_in_metric(X, metric, r=sizes.r)
        case _:
            return group_svd_in_metric(X, metric, m=sizes.m, r=sizes.r, generator=generator)


def _run_mobe(
    X: Float[Tensor, "n p d"],
    sizes: BaselineSizes,
    limits: Limits,
    activation: str,
    weights_std: float | None,
    learning_rate: float | None,
    generator: torch.Generator | None,
    metric: InputMetric | None,
) -> BaselineResult:
    columns = None if metric is None else metric.columns
    if sizes.method is Method.mobe:
        if weights_std is None:
            raise ConfigError("mobe's published start depends on the scale of the weights: give weights_std")
        start = mobe.published_start(X, m=sizes.m, r=sizes.r, weights_std=weights_std, metric=columns)
    else:
        start = mobe.corrected_start(
            X, m=sizes.m, r=sizes.r, activation=activation, generator=generator, metric=columns
        )
    rate = learning_rate or mobe.LEARNING_RATE
    objective = mobe.MobeObjective(X, start, activation=activation, metric=columns)
    fit = minimise(objective, limits, rates=(rate, rate, rate))
    A, B, logits = fit.best
    return _softmax_result(X, sizes, fit, activation, A, logits, bank=B, metric=metric)


def _run_slbf(
    X: Float[Tensor, "n p d"],
    sizes: BaselineSizes,
    limits: Limits,
    activation: str,
    learning_rate: float | None,
    metric: InputMetric | None,
) -> BaselineResult:
    assert sizes.atom_rank is not None
    columns = None if metric is None else metric.columns
    start = slbf.matrix_sign_start(X, r=sizes.r, atom_rank=sizes.atom_rank, metric=columns)
    rate = learning_rate or slbf.LEARNING_RATE
    atom_rate = rate * slbf.ATOM_LEARNING_RATE / slbf.LEARNING_RATE
    objective = slbf.SlbfObjective(X, start, activation=activation, metric=columns)
    fit = minimise(
        objective,
        limits,
        rates=(rate, atom_rate, atom_rate, rate),
        weight_decay=slbf.WEIGHT_DECAY,
        cosine_floor=slbf.COSINE_FLOOR,
    )
    A, U, V, logits = fit.best
    U, V = gauge_fix(U, V)
    return _softmax_result(X, sizes, fit, activation, A, logits, atoms_left=U, atoms_right=V, metric=metric)


def _softmax_result(
    X: Float[Tensor, "n p d"],
    sizes: BaselineSizes,
    fit: AdamOutcome,
    activation: str,
    A: Float[Tensor, "n p r"],
    logits: Float[Tensor, "n m"],
    *,
    bank: Float[Tensor, "m r d"] | None = None,
    atoms_left: Float[Tensor, "m r k"] | None = None,
    atoms_right: Float[Tensor, "m k d"] | None = None,
    metric: InputMetric | None = None,
) -> BaselineResult:
    codes = torch.softmax(logits, 1)
    M = mixed_bases(
        codes, bank, atoms_left=atoms_left, atoms_right=atoms_right, lam=1.0, activation=activation
    )
    return BaselineResult(
        sizes=sizes,
        label=str(sizes.method),
        bank=bank,
        atoms_left=atoms_left,
        atoms_right=atoms_right,
        codes=codes,
        adapters=A,
        mean=None,
        activation=activation,
        lam=1.0,
        relfrob=_error(X, A, M, None, metric),
        history=fit.history,
        stop=fit.stop,
    )


def refit_adapters(
    result: BaselineResult, experts: Float[Tensor, "n p d"], metric: InputMetric | None = None
) -> BaselineResult:
    """`result` with the best adapters for its bases, A_i = (X_i - mean) M_i^+, and `+refit` on its label.

    No published method does this; it is a variant of its own and never replaces the method's own figure.
    """
    M = mixed_bases(
        result.codes,
        result.bank,
        atoms_left=result.atoms_left,
        atoms_right=result.atoms_right,
        lam=result.lam,
        activation=result.activation,
    )
    seen = M if metric is None else metric.bases(M, slice(0, len(M)))
    A = least_squares(_less_mean(experts, result.mean, metric), seen).adapters
    error = _error(experts, A, M, result.mean, metric)
    return replace(result, label=f"{result.label}+refit", adapters=A, relfrob=error)


def _error(
    X: Float[Tensor, "n p d"],
    A: Float[Tensor, "n p r"],
    M: Float[Tensor, "n r d"],
    mean: Float[Tensor, "p d"] | None,
    metric: InputMetric | None,
) -> float:
    """RelFrob from the residual; what is left beside a mean is still measured against all of X."""
    seen = M if metric is None else metric.bases(M, slice(0, len(M)))
    return relfrob(squared_errors(_less_mean(X, mean, metric), A, seen), squared_norms(X))


def _less_mean(
    X: Float[Tensor, "n p d"], mean: Float[Tensor, "p d"] | None, metric: InputMetric | None
) -> Float[Tensor, "n p d"]:
    """X less the mean expert, as the metric sees it."""
    if mean is None:
        return X
    return X - (mean if metric is None else metric.seen(mean.expand_as(X), slice(0, len(X))))
