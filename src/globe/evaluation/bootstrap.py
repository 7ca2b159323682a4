"""Confidence intervals for figures of a text, from its windows in order."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95
FEWEST = 8
"""Windows below which an interval would say more about the bootstrap than about the text."""


class Interval(NamedTuple):
    low: float
    high: float


def ratio_interval(
    numerator: Float[Tensor, " w"], denominator: Float[Tensor, " w"], *, seed: int
) -> Interval | None:
    """Return the percentile interval of sum(numerator) / sum(denominator) over w windows; None for fewer than 8.

    Circular block bootstrap (Politis and Romano 1992): neighbouring windows are of one kind of text, so
    blocks of ceil(w^(1/3)) windows are drawn instead of single ones. The same seed and w give the same
    draws: a difference between two models should be given as one numerator, which pairs them.
    """
    w = numerator.shape[0]
    if w < FEWEST:
        return None
    length = math.ceil(w ** (1 / 3))
    place = (torch.arange(w).unsqueeze(1) + torch.arange(length)) % w
    above, below = (values.double()[place].sum(dim=1) for values in (numerator, denominator))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(w, (RESAMPLES, math.ceil(w / length)), generator=generator)
    ratios = above[drawn].sum(dim=1) / below[drawn].sum(dim=1)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(ratios, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Interval(float(low), float(high))
