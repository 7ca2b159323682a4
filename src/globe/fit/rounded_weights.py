"""Methods that round the weights themselves, run and measured in the place of a fit."""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors, FitResult, StopReason
from globe.bank.gauge import share_bits
from globe.bank.precision import Precision
from globe.bank.rounding import Grid, LevelGrid
from globe.baselines.rounded_weights import round_weights
from globe.config.choices import Method
from globe.config.schema import Config
from globe.fit.finalise import Finalised, measured
from globe.fit.input_metric import metric_of
from globe.fit.normalise import fold_scale
from globe.fit.reading import ReadExperts
from globe.numerics.input_metric import InputMetric

_GROUP = 64
"""Columns that share a scale where `bank.group_A` says nothing."""


def fit_rounded_weights(
    read: ReadExperts, config: Config, precision: Precision, *, seed: int
) -> tuple[FitResult, Finalised]:
    """Round the experts by `config.method`; the records are those of a bank of one atom, the identity or a rotation.

    Feedback is in the metric of `normalise.metric`, for each expert where it has one for each. Within `bank.size` the
    bits are shared out over the rows of all experts by what these matter, as those of a bank's adapters are.
    """
    started = time.perf_counter()
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
        """Return the coupling of rows, which the inputs of down are here."""
        assert metric is not None
        assert metric.rows is not None
        return metric.rows[part].mT @ metric.rows[part]

    both = metric is not None and metric.rows is not None and metric.rows.dim() == 3
    by_row = config.bank.size is not None
    alike = Grid.of(int(precision.adapters), d, precision.group_adapters or _GROUP)
    rounded = round_weights(
        W,
        _levels(X[:], metric, precision) if by_row else alike,
        moments=None if config.method is Method.rtn else moments,
        coupled=coupled if both else None,
        seed=seed if config.method is Method.gptq_rotated else None,
        whole_rows=by_row,
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


def _levels(X: Float[Tensor, "n p d"], metric: InputMetric | None, precision: Precision) -> LevelGrid:
    """Share the bits out over rows by their energy and what it counts for; rotated columns are all alike."""
    n, p, d = X.shape
    rows = X.square().sum(dim=2)
    if metric is not None:
        rows *= metric.row_squares(slice(0, n), X)
    grid = share_bits(rows, X.new_ones(d), n * p * precision.row_bits(d))
    assert grid is not None, "a bit for each weight is enough"
    return grid
