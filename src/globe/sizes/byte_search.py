"""Sizes and bits within a budget of bytes, by short fits that are rounded: what `bank.size` chooses."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import Sizes
from globe.config.schema import Config, is_linear
from globe.errors import FitError
from globe.fit.input_metric import of_model
from globe.fit.options import fit_options
from globe.fit.plan import BankSize
from globe.fit.rounding import round_factors
from globe.numerics.figures import squared_norms
from globe.numerics.input_metric import InputMetric
from globe.sizes.budget import Room, grid
from globe.sizes.byte_room import AVERAGES, ByteRoom
from globe.sizes.search import FEWEST_STEPS, Frontier, Round, probes_of

_log = logging.getLogger(__name__)
_MOST_ATOMS = 4
"""The search looks at up to n / 4 atoms; more take so many bytes that they were never the best."""
_AT_LEAST_BETTER = 0.98
"""More atoms are tried as long as they are no worse than this: doubling their number goes on until it costs."""


def search_bytes(
    X: Float[Tensor, "n p d"], room: ByteRoom, config: Config, *, metric: InputMetric | None = None, seed: int
) -> Frontier:
    """Fit and round a bank of every number of atoms, then of the best one with other bits, and take the best.

    The error is that of the rounded factors, in the metric of the fit. Numbers of atoms are doubled from one as long as
    the error does not rise. Raises FitError if all fits break.
    """
    tried: dict[BankSize, float] = {}

    def attempt(m: int, average: float) -> float:
        size = room.filled(m, average)
        if size is None:
            return math.inf
        if size not in tried:
            tried[size] = _error(X, metric, size, room, config, seed)
            _log.info("%s: error %.4f once rounded", size.text, tried[size])
        return tried[size]

    best, least = 1, attempt(1, AVERAGES[0])
    for m in grid(1, max(1, room.n // _MOST_ATOMS), 2.0)[1:]:
        error = attempt(m, AVERAGES[0])
        if error < least:
            best, least = m, error
        elif error * _AT_LEAST_BETTER > least:
            break
    for average in AVERAGES[1:]:
        attempt(best, average)
    chosen = min(tried, key=tried.__getitem__, default=None)
    if chosen is None or not math.isfinite(tried[chosen]):
        raise FitError(
            "no size within bank.size could be fitted: use dtype=float64, or give bank.m, bank.r, bank.bits"
        )
    whole = Room(room.n, room.p, room.d, room.bits // 16)
    return Frontier(whole, (Round(whole, FEWEST_STEPS, probes_of(tried)),), chosen)


def byte_candidates(room: ByteRoom) -> list[BankSize]:
    """Return the sizes that a search may try, without its fits."""
    tried = [room.filled(m, AVERAGES[0]) for m in grid(1, max(1, room.n // _MOST_ATOMS), 2.0)]
    tried += [room.filled(1, average) for average in AVERAGES[1:]]
    return list(dict.fromkeys(one for one in tried if one is not None))


def _error(
    X: Float[Tensor, "n p d"],
    metric: InputMetric | None,
    size: BankSize,
    room: ByteRoom,
    config: Config,
    seed: int,
) -> float:
    """Return the relative error of a short fit once it is rounded, in the metric; infinity where it breaks."""
    sizes = Sizes(room.n, room.p, room.d, size.m, size.r, atom_rank=size.atom_rank)
    precision = room.precision(size)
    train = replace(config.train, steps=FEWEST_STEPS, time_limit=None, patience=0, checkpoint_every=1e9)
    linear = is_linear(config)
    seen = X if metric is None else metric.seen(X, slice(0, len(X)))
    try:
        fitted = fit_bank(
            seen,
            sizes,
            fit_options(replace(config, train=train), precision=precision),
            metric=None if metric is None else metric.kernel(linear=linear),
            generator=torch.Generator().manual_seed(seed),
        )
        factors = fitted.factors if metric is None else of_model(metric, fitted.factors, linear=linear)
        rounded = round_factors(
            X,
            factors,
            precision,
            lam=fitted.lam,
            activation=str(config.bank.activation),
            export_dtype=torch.bfloat16,
            metric=metric,
        )
    except (FitError, torch.linalg.LinAlgError) as error:
        _log.warning("%s is left out: %s", size.text, error)
        return math.inf
    return math.sqrt(rounded.error / max(float(squared_norms(seen).sum()), 1e-300))
