"""The metric that a bank is fitted in, and its factors outside of it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors
from globe.config.choices import Metric as Choice
from globe.config.schema import Config, chosen_metric
from globe.fit.observed import inputs_metric
from globe.fit.reading import ReadExperts
from globe.numerics.chunks import expert_chunks
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.input_metric import InputMetric
from globe.numerics.metric import metric_of_roots, root_of, times_inverse

_FLOOR = 1e-3
"""Weight of a direction that no row has, beside the mean of 1. It bounds what an error there may become."""


def second_moment_metric(X: Float[Tensor, "n p d"], group: ProcessGroup = ALONE) -> InputMetric | None:
    """Return the metric of the experts' own rows: C = sum_i X_i^T X_i + floor for all, scaled so that ||X L|| = ||X||.

    Trained weights are sums of gradients g x^T, so the rows of all experts together lean to the directions that inputs
    have; no text is needed. Directions without any energy keep 1e-3 of the mean eigenvalue. Zero experts give None, the
    plain metric. In float64 where the device has it, whatever the dtype of X.
    """
    d = X.shape[2]
    wide = torch.float32 if X.device.type == "mps" else torch.float64
    C = torch.zeros(d, d, dtype=wide, device=X.device)
    for part in expert_chunks(*X.shape):
        rows = X[part].flatten(0, 1)
        C += (rows.T @ rows).to(wide)
    C = group.sum(C)
    mean = float(C.diagonal().mean())
    if mean <= 0:
        return None
    C /= mean
    weighted = C.clone()
    weighted.diagonal().add_(_FLOOR)
    # of an energy of d in all, tr(C weighted) is what the metric makes of it
    weighted *= d / float((C * weighted).sum())
    columns = metric_of_roots(group.same(root_of(weighted).to(X.dtype))[None], common=True, group=group)
    return None if columns is None else InputMetric(columns)


def of_model(metric: InputMetric, factors: Factors, *, linear: bool) -> Factors:
    """Return factors that a fit with the metric's kernel gave, as those of the experts themselves."""
    factors = factors._replace(adapters=metric.adapters(factors.adapters, slice(None)))
    root = metric.one_root
    if root is None or not linear:
        return factors
    right = None if factors.right is None else times_inverse(factors.right, root)
    return factors._replace(bank=times_inverse(factors.bank, root), right=right)


def metric_of(config: Config, read: ReadExperts, group: ProcessGroup = ALONE) -> InputMetric | None:
    """Return the metric that `normalise.metric` asks for; None is the plain Frobenius norm."""
    match chosen_metric(config):
        case Choice.experts:
            return second_moment_metric(read.joined.experts, group)
        case Choice.inputs:
            return inputs_metric(read.observed, read.joined.experts, read.joined.scale, group=group)
        case _:
            return None
