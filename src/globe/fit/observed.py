"""The metric of a bank's experts from what they did on a calibration text.

The squared error that E_i makes in the output of expert i is to first order gate2_i sum_k rows_ik (E_i C_i E_i^T)_kk,
with the second moment C_i of the inputs that are routed to it, what depends on its row k, and the sum of squared gate
values. An expert that few tokens reach knows little of all that; it borrows from the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.calibration.statistics import LayerStatistics
from globe.checkpoint.experts import SHARED
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.input_metric import InputMetric
from globe.numerics.metric import Metric, metric_of_roots, root_of

FLOOR = 1e-2
"""Weight of a direction that no input has, beside the mean of 1."""
LEAST = 1e-3
"""Weight of a row that nothing depends on, beside the mean of 1."""


class Observed(NamedTuple):
    """The experts of one member of a bank, in the order of its rows, and what their layer did."""

    statistics: LayerStatistics
    family: str
    experts: tuple[int, ...]
    """numbers of routed experts; -1 is the shared one, which has no statistics and stands for an average expert"""


def inputs_metric(
    members: Sequence[Observed],
    X: Float[Tensor, "n p d"],
    scale: Tensor | None = None,
    *,
    group: ProcessGroup = ALONE,
) -> InputMetric | None:
    """D_i and L_i of the normalised experts X of a bank, whose members stand below each other.

    `scale`, one per expert (n,) or per row (n, p), is what the experts were divided by: an error counts as that of the
    expert itself. Each member keeps its energy, sum_i ||D_i X_i L_i||^2 = sum_i ||X_i||^2, so that members weigh what
    they weighed. None if nothing is left but the plain metric. With several processes X and `scale` are this one's.
    """
    starts = [0]
    for member in members:
        starts.append(starts[-1] + len(member.experts))
    parts = [group.within(*bounds) for bounds in pairwise(starts)]
    columns = _columns(members, parts, X, group)
    weights = [row_weights(one)[part.rows] for one, part in zip(members, parts, strict=True)]
    rows = torch.cat(weights).sqrt()
    if scale is not None:
        rows = rows * scale.double().cpu().reshape(len(scale), -1)
    uneven = group.any(bool((rows != rows[:1, :1]).any())) if len(rows) else group.any(False)
    if columns is None and not uneven:
        return None
    metric = InputMetric(columns, rows.to(X))
    first = 0
    for own, part in zip(weights, parts, strict=True):
        here = slice(first, first + len(own))
        first += len(own)
        energy = part.total(float(X[here].double().square().sum()))
        seen = part.total(float(metric.norms(X[here], here.start).sum()))
        rows[here] *= (energy / seen) ** 0.5 if seen > 0 else 1.0
    return InputMetric(columns, rows.to(X))


def row_weights(one: Observed) -> Float[Tensor, "n p"]:
    """D_i^2 of all experts of a member, of mean 1: how often an expert is used times what depends on each of its rows.

    sum g^2 rows_ik tr C_i, its mean over the tokens of an expert first shrunk to that of the layer by d tokens.
    """
    s = one.statistics
    each = s.rows_up if one.family == "up" else s.rows_gate
    assert each is not None, "experts without a gate have no family gate"
    d = s.inputs.q
    traces = _traces(s)
    total = each.double() * (s.gate2 * traces)[:, None]
    mean = total.sum() / (s.counts.sum() * each.shape[1]).clamp_min(1)
    shrunk = (total + d * mean) / (s.counts + d)[:, None]
    weight = shrunk * s.counts[:, None]
    weight = weight / weight.mean() if float(weight.sum()) > 0 else torch.ones_like(weight)
    weight = (weight + LEAST) / (1 + LEAST)
    average = weight.new_ones(1, each.shape[1])
    return torch.cat([average if expert == SHARED else weight[expert, None] for expert in one.experts])


def metric_of_expert(s: LayerStatistics, expert: int, mean: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """C_i, shrunk to the layer's `mean` by d tokens, of mean eigenvalue 1, with a floor; in float64."""
    C = mean
    if expert != SHARED:
        own, count = s.inputs.dense([expert])[0].double(), float(s.counts[expert])
        C = (count * own + len(mean) * mean) / (count + len(mean))
    C = C / C.diagonal().mean()
    C.diagonal().add_(FLOOR)
    return C / (1 + FLOOR)


def layer_mean(s: LayerStatistics) -> Float[Tensor, "d d"]:
    """The second moment of the inputs of all experts of a layer, each weighted by its sum of g^2, in float64."""
    d = s.inputs.q
    mean = torch.zeros(d, d, dtype=torch.float64)
    share = s.gate2 / s.gate2.sum().clamp_min(1e-300)
    for expert in range(s.inputs.n):
        mean.add_(s.inputs.dense([expert])[0].double(), alpha=float(share[expert]))
    return mean if float(mean.diagonal().sum()) > 0 else torch.eye(d, dtype=torch.float64)


def _traces(s: LayerStatistics) -> Float[Tensor, " n"]:
    rows = [s.inputs.dense([expert])[0].diagonal().double().sum() for expert in range(s.inputs.n)]
    return torch.stack(rows)


def _columns(
    members: Sequence[Observed], parts: Sequence[ProcessGroup], X: Float[Tensor, "n p d"], group: ProcessGroup
) -> Metric | None:
    """L of the experts here; up and gate of one expert have one."""
    wanted = [
        (at, one.statistics.layer, expert)
        for at, (one, part) in enumerate(zip(members, parts, strict=True))
        for expert in one.experts[part.rows]
    ]
    places = {(layer, expert): None for _, layer, expert in wanted}
    index = {key: at for at, key in enumerate(places)}
    of_layer = {one.statistics.layer: one.statistics for one in members}
    means = {layer: layer_mean(s) for layer, s in of_layer.items()}
    roots = X.new_empty(len(index), X.shape[2], X.shape[2])
    for (layer, expert), at in index.items():
        roots[at] = root_of(metric_of_expert(of_layer[layer], expert, means[layer])).to(roots)
    which: Int[Tensor, " n"] = torch.tensor([index[layer, expert] for _, layer, expert in wanted])
    in_order = len(which) == len(roots)
    return metric_of_roots(roots, None if in_order else which.to(X.device), group=group)
