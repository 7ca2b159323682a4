"""The metric of a bank's experts from what they did on a calibration text.

The squared error that E_i makes in the output of expert i is to first order gate2_i sum_k rows_ik (E_i C_i E_i^T)_kk,
with the second moment C_i of the inputs that are routed to it, what depends on its row k, and the sum of squared gate
values. For down, whose matrices are read transposed, it is gate2_i tr(E_i^T H_i E_i) with the second moment H_i of its
inputs. An expert that few tokens reach knows little of all that; it borrows from the layer. Where gradients say how
much each direction of the output counts, rows of up and gate are weighted by those they write in, and columns of down,
which are these directions, by F.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.calibration.statistics import LayerStatistics, OutputWeights, SecondMoments
from globe.checkpoint.experts import SHARED
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.input_metric import InputMetric
from globe.numerics.metric import Metric, metric_of_roots, root_of

FLOOR = 1e-2
"""Weight of a direction that no input has, beside the mean of 1."""
_DOWN = -2
"""Stands for an expert's number where all have one metric of columns."""
LEAST = 1e-3
"""Weight of a row that nothing depends on, beside the mean of 1."""


class Observed(NamedTuple):
    """The experts of one member of a bank, in the order of its rows, and what their layer did."""

    statistics: LayerStatistics
    family: str
    experts: tuple[int, ...]
    """numbers of routed experts; -1 is the shared one, which has no statistics and stands for an average expert"""

    @property
    def is_down(self) -> bool:
        return self.family == "down"


def inputs_metric(
    members: Sequence[Observed],
    X: Float[Tensor, "n p d"],
    scale: Tensor | None = None,
    *,
    group: ProcessGroup = ALONE,
) -> InputMetric | None:
    """Return D_i and L_i of the normalised experts X of a bank, whose members stand below each other.

    `scale`, one per expert (n,) or per row (n, p), is what the experts were divided by: an error counts as that of the
    expert itself. Each member keeps its energy, sum_i ||D_i X_i L_i||^2 = sum_i ||X_i||^2, so that members weigh what
    they weighed. None if nothing is left but the plain metric. With several processes X and `scale` are this one's.
    """
    starts = accumulate((len(member.experts) for member in members), initial=0)
    parts = [group.within(*bounds) for bounds in pairwise(starts)]
    columns = _columns(members, parts, X, group)
    rows = [_rows(one, part) for one, part in zip(members, parts, strict=True)]
    if any(one.is_down for one in members):
        rows = [one if one.dim() == 3 else torch.diag_embed(one) for one in rows]
    if scale is not None:
        whole, first = scale.double().cpu().reshape(len(scale), -1), 0
        for at, one in enumerate(rows):
            own = whole[first : first + len(one)]
            rows[at] = one * (own if one.dim() == 2 else own.unsqueeze(1))
            first += len(one)
    if columns is None and not group.any(any(_uneven(one, rows) for one in rows)):
        return None
    spread, first = torch.cat(rows), 0
    for at, (one, part) in enumerate(zip(rows, parts, strict=True)):
        here = slice(first, first + len(one))
        first += len(one)
        energy = part.total(float(X[here].double().square().sum()))
        seen = part.total(float(InputMetric(columns, spread.to(X)).norms(X[here], here.start).sum()))
        rows[at] = one * ((energy / seen) ** 0.5 if seen > 0 else 1.0)
    return InputMetric(columns, torch.cat(rows).to(X))


def _uneven(one: Tensor, rows: Sequence[Tensor]) -> bool:
    if one.dim() == 3:
        return True
    common = next((other[0, 0] for other in rows if len(other)), None)
    return common is not None and bool((one != common).any())


def _rows(one: Observed, part: ProcessGroup) -> Tensor:
    """Return D_i of the experts here of a member: (n, p), or (n, p, p) upper triangular for down."""
    if not one.is_down:
        return row_weights(one)[part.rows].sqrt()
    weights, mean = expert_weights(one), mean_of(one.statistics.inner, one.statistics.gate2)
    here = list(zip(one.experts, weights, strict=True))[part.rows]
    made = torch.zeros(len(here), len(mean), len(mean), dtype=torch.float64)
    for at, (expert, weight) in enumerate(here):
        made[at] = root_of(weight * shrunk(one.statistics, one.statistics.inner, expert, mean)).T
    return made


def row_weights(one: Observed) -> Float[Tensor, "n p"]:
    """Return D_i^2 of a member's experts, of mean 1: how often each is used times what depends on each of its rows.

    sum g^2 rows_ik tr C_i, its mean over the tokens of an expert first shrunk to that of the layer by d tokens.
    """
    s = one.statistics
    return _of_experts(one, s.rows(one.family).double() * (s.gate2 * _traces(s.inputs))[:, None], s.inputs.q)


def expert_weights(one: Observed) -> Float[Tensor, " n"]:
    """Return the same of each expert of down as a whole: sum g^2 tr H_i."""
    s = one.statistics
    return _of_experts(one, (s.gate2 * _traces(s.inner))[:, None], s.inner.q)[:, 0]


def _of_experts(one: Observed, total: Float[Tensor, "routed k"], prior: int) -> Float[Tensor, "n k"]:
    """Return sums over tokens, shrunk token by token, as weights of mean 1 of the experts of a member."""
    counts = one.statistics.counts
    mean = total.sum() / (counts.sum() * total.shape[1]).clamp_min(1)
    weight = (total + prior * mean) / (counts + prior)[:, None] * counts[:, None]
    weight = weight / weight.mean() if float(weight.sum()) > 0 else torch.ones_like(weight)
    weight = (weight + LEAST) / (1 + LEAST)
    average = weight.new_ones(1, total.shape[1])
    return torch.cat([average if expert == SHARED else weight[expert, None] for expert in one.experts])


def shrunk(
    s: LayerStatistics, moments: SecondMoments, expert: int, mean: Float[Tensor, "q q"]
) -> Float[Tensor, "q q"]:
    """Return the second moment of an expert, shrunk to the layer's `mean` by q tokens, mean eigenvalue 1, floored."""
    C = mean
    if expert != SHARED:
        own, count = moments.dense([expert])[0].double(), float(s.counts[expert])
        C = (count * own + len(mean) * mean) / (count + len(mean))
    C = C / C.diagonal().mean()
    C.diagonal().add_(FLOOR)
    return C / (1 + FLOOR)


def mean_of(moments: SecondMoments, gate2: Float[Tensor, " n"]) -> Float[Tensor, "q q"]:
    """Return the second moment over all experts of a layer, each weighted by its sum of g^2, in float64."""
    q = moments.q
    mean = torch.zeros(q, q, dtype=torch.float64)
    share = gate2 / gate2.sum().clamp_min(1e-300)
    for expert in range(moments.n):
        mean.add_(moments.dense([expert])[0].double(), alpha=float(share[expert]))
    return mean if float(mean.diagonal().sum()) > 0 else torch.eye(q, dtype=torch.float64)


def _traces(moments: SecondMoments) -> Float[Tensor, " n"]:
    return torch.stack([moments.dense([at])[0].diagonal().double().sum() for at in range(moments.n)])


def _columns(
    members: Sequence[Observed], parts: Sequence[ProcessGroup], X: Float[Tensor, "n p d"], group: ProcessGroup
) -> Metric | None:
    """Return L of the experts here: one for up and gate of an expert, and one for all of down in a layer."""
    wanted = [
        (one.statistics.layer if one.statistics.output else -1, _DOWN)
        if one.is_down
        else (one.statistics.layer, expert)
        for one, part in zip(members, parts, strict=True)
        for expert in one.experts[part.rows]
    ]
    index = {key: at for at, key in enumerate(dict.fromkeys(wanted))}
    of_layer = {one.statistics.layer: one.statistics for one in members}
    read = {one.statistics.layer for one in members if not one.is_down}
    means = {layer: mean_of(of_layer[layer].inputs, of_layer[layer].gate2) for layer in read}
    roots = X.new_empty(len(index), X.shape[2], X.shape[2])
    for (layer, expert), at in index.items():
        if layer < 0:
            roots[at] = torch.eye(X.shape[2])
            continue
        s = of_layer[layer]
        if expert == _DOWN:
            assert s.output is not None
            roots[at] = _output_root(s.output).to(roots)
            continue
        roots[at] = root_of(shrunk(s, s.inputs, expert, means[layer])).to(roots)
    which: Int[Tensor, " n"] = torch.tensor([index[key] for key in wanted], dtype=torch.int64)
    in_order = len(which) == len(roots)
    if len(of_layer) == 1 and all(one.is_down for one in members):
        return metric_of_roots(roots, common=True, group=group)
    return metric_of_roots(roots, None if in_order else which.to(X.device), group=group)


def _output_root(output: OutputWeights) -> Float[Tensor, "d d"]:
    F = output.matrix
    mean = F.diagonal().mean()
    return root_of(F / mean) if float(mean) > 0 else torch.eye(len(F), dtype=torch.float64)
