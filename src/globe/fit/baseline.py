"""A method that GloBE is measured against, fitted and exported in the place of a GloBE bank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import FitResult, StepRecord
from globe.am.warm_start import truncated_svd
from globe.baselines import BaselinePoint, BaselineResult, BaselineSizes, Limits, run_baseline
from globe.config.choices import ADAM_METHODS
from globe.config.schema import Config
from globe.fit.finalise import Finalised, finalise
from globe.fit.input_metric import metric_of, of_model
from globe.fit.normalise import Joined
from globe.fit.plan import precision_of
from globe.fit.reading import ReadExperts
from globe.numerics.figures import relfrob, squared_norms


def fit_baseline(
    read: ReadExperts,
    sizes: BaselineSizes,
    config: Config,
    *,
    generator: torch.Generator,
    on_step: Callable[[StepRecord], None],
) -> tuple[FitResult, Finalised, str]:
    """Run `config.method` and export it: the same records as of a GloBE fit, and the activation that holds for it.

    The methods trained by Adam take `train.steps` and `train.time_limit`, and `bank.activation` at full strength; the
    closed forms take neither and are linear. All see the experts as `normalise` makes them. No method's codes are
    pruned and no method's adapters refitted, since none is published so.
    """
    trained = config.method in ADAM_METHODS
    joined = read.joined
    X = joined.experts
    norms = squared_norms(X)
    total = float(norms.sum())

    def watch(point: BaselinePoint) -> None:
        on_step(_record(point, sizes.m, total))

    metric = metric_of(config, read)
    if metric is not None:
        metric.enter(X)
    baseline = run_baseline(
        X,
        sizes,
        Limits(config.train.steps, config.train.time_limit, watch) if trained else Limits(),
        activation=str(config.bank.activation),
        weights_std=_weights_std(joined),
        generator=generator,
        metric=metric,
    )
    result, mean = _as_fit(baseline, X, total), baseline.mean
    if metric is not None:
        metric.leave(X)
        result = replace(result, factors=of_model(metric, result.factors, linear=False))
    own = joined if mean is None else less_mean(joined, mean)
    done = finalise(
        result.factors,
        own,
        lam=result.lam,
        activation=baseline.activation,
        export_dtype=read.export_dtype,
        prune=0.0,
        metric=metric,
        precision=precision_of(config),
    )
    # what is left beside a method's own mean expert is still measured against all of the experts
    done = done._replace(norms=norms, relfrob=relfrob(done.errors, norms))
    if metric is not None and mean is not None and done.relfrob_metric is not None:
        share = float(metric.norms(own.experts).sum() / metric.norms(X).sum())
        done = done._replace(relfrob_metric=done.relfrob_metric * share**0.5)
    return result, done, baseline.activation


def less_mean(joined: Joined, mean: Float[Tensor, "p d"]) -> Joined:
    """Return the same experts less a mean expert of the normalised ones, which joins what is stored and added back.

    W = scale X + mean' = scale (X - mean) + (scale mean + mean'), for one member and one scale.
    """
    shift = mean if joined.scale is None else joined.scale.flatten()[0] * mean
    before = joined.mean
    if before is not None and before.dim() == 1:
        before = before[:, None, None]
    stored = shift[None] if before is None else before + shift
    return Joined(joined.experts - mean, stored, joined.scale, joined.starts)


def _weights_std(joined: Joined) -> float:
    """Return the deviation of the weights before normalisation, on which MoBE's published start depends."""
    return 1.0 if joined.scale is None else float(joined.scale.double().square().mean().sqrt())


def _as_fit(baseline: BaselineResult, X: Float[Tensor, "n p d"], total: float) -> FitResult:
    ceiling = truncated_svd(X, min(baseline.sizes.r, *X.shape[1:])).adapters
    return FitResult(
        baseline.factors,
        lam=baseline.lam,
        stop=baseline.stop,
        steps=baseline.steps,
        relfrob_start=baseline.history[0].relfrob,
        relfrob=baseline.relfrob,
        energy_captured=float(squared_norms(ceiling).sum()) / total if total else 1.0,
        accepted=baseline.steps,
        seconds=baseline.seconds,
    )


def _record(point: BaselinePoint, m: int, total: float) -> StepRecord:
    """Return a measured state as a line of `metrics.jsonl`: softmax codes use every atom, and nothing is scheduled."""
    return StepRecord(
        point.step, point.seconds, point.relfrob**2 * total, point.relfrob, float(m), float(m), m, m
    )
