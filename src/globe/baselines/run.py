"""One call for every baseline: the same experts, the same budget, the same result."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors, StopReason
from globe.bank.compose import factor_bases
from globe.baselines import mobe, slbf
from globe.baselines.adam import AdamOutcome, Limits, load_optimiser, minimise
from globe.baselines.gauge import gauge_fix
from globe.baselines.group_svd import group_svd
from globe.baselines.in_metric import group_svd_in_metric, mean_svd_in_metric, svd_in_metric
from globe.baselines.mean_svd import mean_svd
from globe.baselines.records import BaselinePoint, BaselineResult, BaselineSizes
from globe.baselines.shared_basis import shared_basis
from globe.baselines.svd import svd
from globe.config.choices import ADAM_METHODS, Method
from globe.errors import ConfigError
from globe.numerics.figures import relfrob, squared_errors, squared_norms
from globe.numerics.input_metric import InputMetric
from globe.numerics.metric import Metric


@torch.no_grad()
def run_baseline(
    X: Float[Tensor, "n p d"],
    sizes: BaselineSizes,
    limits: Limits = Limits(),  # noqa: B008  (immutable)
    *,
    activation: str = "silu",
    weights_std: float | None = None,
    learning_rate: float | None = None,
    generator: torch.Generator | None = None,
    metric: InputMetric | None = None,
) -> BaselineResult:
    """Approximate normalised experts X by the method that `sizes` belong to.

    Parameters
    ----------
    sizes           of `resolve_sizes`
    limits          when the Adam methods end, which need steps or seconds; closed forms take neither
    activation      of the Adam methods: silu, tanh, identity
    weights_std     for `mobe` alone, and needed there: the standard deviation of the weights before
                    normalisation, which its published start depends on
    learning_rate   other than the published one; SLBF's atoms keep their ratio to it
    generator       lets `group_svd` and `mobe_corrected` try random groups besides consecutive ones
    metric          how errors count; experts are D_i X_i L_i then, and so are adapters D_i A_i and all errors

    Equal inputs, generator state and steps give equal results; a time limit does not. Raises ConfigError for missing
    limits, FitError where nothing finite comes out.
    """
    if sizes.method not in ADAM_METHODS:
        return _run_closed_form(X, sizes, limits._replace(started=limits.clock()), generator, metric)
    if limits.steps is None and limits.seconds is None:
        raise ConfigError(f"{sizes.method} runs until a limit: give steps or seconds")
    load_optimiser()
    limits = limits._replace(started=limits.clock())
    columns = None if metric is None else metric.columns
    if sizes.method is Method.slbf:
        factors, fit = _slbf(X, sizes, limits, activation, learning_rate, columns)
    else:
        start = _mobe_start(X, sizes, activation, weights_std, generator, columns)
        rate = learning_rate or mobe.LEARNING_RATE
        objective = mobe.MobeObjective(X, start, activation=activation, metric=columns)
        fit = minimise(objective, limits, rates=(rate, rate, rate))
        A, B, logits = fit.best
        factors = Factors(B, torch.softmax(logits, 1), A)
    error = _error(X, factors, None, 1.0, activation, metric)
    return BaselineResult(sizes, factors, None, activation, 1.0, error, fit.history, fit.stop)


def _run_closed_form(
    X: Float[Tensor, "n p d"],
    sizes: BaselineSizes,
    limits: Limits,
    generator: torch.Generator | None,
    metric: InputMetric | None,
) -> BaselineResult:
    mean = None
    match sizes.method:
        case Method.svd:
            factors = svd(X, r=sizes.r) if metric is None else svd_in_metric(X, metric, r=sizes.r)
        case Method.mean_svd if metric is not None:
            factors, mean = mean_svd_in_metric(X, metric, r=sizes.r)
        case Method.mean_svd:
            factors, mean = mean_svd(X, r=sizes.r)
        case _ if metric is not None:
            factors = group_svd_in_metric(X, metric, m=sizes.m, r=sizes.r, generator=generator)
        case Method.shared_basis:
            factors = shared_basis(X, r=sizes.r)
        case _:
            factors = group_svd(X, m=sizes.m, r=sizes.r, generator=generator)
    seconds = limits.elapsed()
    point = BaselinePoint(0, seconds, _error(X, factors, mean, 0.0, "identity", metric))
    if limits.on_step:
        limits.on_step(point)
    stop = StopReason.closed_form
    return BaselineResult(sizes, factors, mean, "identity", 0.0, point.relfrob, (point,), stop)


def _mobe_start(
    X: Float[Tensor, "n p d"],
    sizes: BaselineSizes,
    activation: str,
    weights_std: float | None,
    generator: torch.Generator | None,
    columns: Metric | None,
) -> mobe.SoftmaxFactors:
    m, r = sizes.m, sizes.r
    if sizes.method is Method.mobe_corrected:
        return mobe.corrected_start(X, m=m, r=r, activation=activation, generator=generator, metric=columns)
    if weights_std is None:
        raise ConfigError("mobe's published start depends on the scale of the weights: give weights_std")
    return mobe.published_start(X, m=m, r=r, weights_std=weights_std, metric=columns)


def _slbf(
    X: Float[Tensor, "n p d"],
    sizes: BaselineSizes,
    limits: Limits,
    activation: str,
    learning_rate: float | None,
    columns: Metric | None,
) -> tuple[Factors, AdamOutcome]:
    assert sizes.atom_rank is not None
    start = slbf.matrix_sign_start(X, r=sizes.r, atom_rank=sizes.atom_rank, metric=columns)
    rate = learning_rate or slbf.LEARNING_RATE
    atom_rate = rate * slbf.ATOM_LEARNING_RATE / slbf.LEARNING_RATE
    fit = minimise(
        slbf.SlbfObjective(X, start, activation=activation, metric=columns),
        limits,
        rates=(rate, atom_rate, atom_rate, rate),
        weight_decay=slbf.WEIGHT_DECAY,
        cosine_floor=slbf.COSINE_FLOOR,
    )
    A, U, V, logits = fit.best
    U, V = gauge_fix(U, V)
    return Factors(U @ V, torch.softmax(logits, 1), A, U, V), fit


def _error(
    X: Float[Tensor, "n p d"],
    factors: Factors,
    mean: Float[Tensor, "p d"] | None,
    lam: float,
    activation: str,
    metric: InputMetric | None,
) -> float:
    """Return RelFrob from the residual; what is left beside a mean is still measured against all of X."""
    seen = _seen_bases(factors, lam, activation, metric)
    return relfrob(squared_errors(_less_mean(X, mean, metric), factors.adapters, seen), squared_norms(X))


def _seen_bases(
    factors: Factors, lam: float, activation: str, metric: InputMetric | None
) -> Float[Tensor, "n r d"]:
    M = factor_bases(factors, lam=lam, activation=activation)
    return M if metric is None else metric.bases(M, slice(0, len(M)))


def _less_mean(
    X: Float[Tensor, "n p d"], mean: Float[Tensor, "p d"] | None, metric: InputMetric | None
) -> Float[Tensor, "n p d"]:
    """Return X less the mean expert, as the metric sees it."""
    if mean is None:
        return X
    return X - (mean if metric is None else metric.seen(mean.expand_as(X), slice(0, len(X))))
