"""What the adapters cannot absorb of an expert's metric: K_i = L_i (I - Q_i^T Q_i) L_i^T."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.objective import Point
from globe.numerics.chunks import expert_chunks
from globe.numerics.group import ProcessGroup


class Remainder(NamedTuple):
    """K_i of every expert here, and their mean over the experts of all processes."""

    own: Float[Tensor, "n d d"]
    mean: Float[Tensor, "d d"]


def remainder(point: Point, group: ProcessGroup, *, dtype: torch.dtype) -> Remainder:
    """Return K_i as a matrix, in `dtype`, and their mean in the dtype of the point.

    Once made, a product with it costs r d^2 multiply-adds, less than two with L_i and the projection between them. It
    is made in the dtype of the fit and rounded once: the difference cancels most where the metric is largest.
    """
    metric, rows = point.metric, point.rows
    assert metric is not None
    n, r, d = rows.shape
    own = rows.new_empty(n, d, d, dtype=dtype)
    total = rows.new_zeros(d, d)
    for part in expert_chunks(n, max(r, d), d):
        Q, root = rows[part], metric.of(part)
        kept = root @ (root.mT - Q.mT @ (Q @ root.mT))
        total += kept.sum(dim=0)
        own[part] = kept
    total = group.sum(total) / group.count(n)
    return Remainder(own, (total + total.T) / 2)
