"""Methods that round the weights themselves, run and measured in the place of a fit."""

from __future__ import annotations

import time

import torch

from globe.am.records import Factors, FitResult, StopReason
from globe.baselines.rounded_weights import round_weights
from globe.config.choices import Method
from globe.config.schema import Config
from globe.fit.finalise import Finalised, measured
from globe.fit.input_metric import metric_of
from globe.fit.normalise import fold_scale
from globe.fit.plan import precision_of
from globe.fit.reading import ReadExperts

_GROUP = 64
"""Columns that share a scale where `bank.group_A` says nothing."""


def fit_rounded_weights(read: ReadExperts, config: Config, *, seed: int) -> tuple[FitResult, Finalised]:
    """Round the experts by `config.method`; the records are those of a bank of one atom, the identity or a rotation.

    Feedback is in the metric of `normalise.metric`, for each expert where it has one for each.
    """
    started = time.perf_counter()
    precision = precision_of(config)
    assert precision is not None
    joined, export_dtype = read.joined, read.export_dtype
    X = joined.experts
    metric = metric_of(config, read)
    W = fold_scale(X[:], joined.scale)
    n, _, d = W.shape

    def moments(part: slice) -> torch.Tensor:
        if metric is None or metric.columns is None:
            return torch.eye(d, dtype=W.dtype, device=W.device).expand(len(range(n)[part]), d, d)
        L = metric.columns.of(part)
        return (L @ L.mT).expand(len(range(n)[part]), d, d)

    def coupled(part: slice) -> torch.Tensor:
        """Of down, whose inputs are rows here."""
        assert metric is not None
        assert metric.rows is not None
        return metric.rows[part].mT @ metric.rows[part]

    both = metric is not None and metric.rows is not None and metric.rows.dim() == 3
    rounded = round_weights(
        W,
        bits=int(precision.adapters),
        group=precision.group_adapters or _GROUP,
        moments=None if config.method is Method.rtn else moments,
        coupled=coupled if both else None,
        seed=seed if config.method is Method.gptq_rotated else None,
    )
    del W
    basis = rounded.basis.to(export_dtype)
    factors = Factors(basis[None], X.new_ones(n, 1, dtype=export_dtype), rounded.packed.values(export_dtype))
    done = measured(
        factors,
        joined,
        lam=0.0,
        activation="identity",
        export_dtype=export_dtype,
        metric=metric,
        packed={"adapters": rounded.packed},
    )
    result = FitResult(
        factors,
        lam=0.0,
        stop=StopReason.closed_form,
        steps=0,
        relfrob_start=done.relfrob,
        relfrob=done.relfrob,
        seconds=time.perf_counter() - started,
    )
    return result, done
