"""`budget.over=model` with `bank.size`: one budget of bytes for all banks of a run, spread before any fit.

What an entry of the adapters costs if it is left out is known in advance: with one basis for all experts in the mean
metric it is the energy of the expert's row in that direction, and bits lower it as `NOISE` says. One water level for
the entries of all banks together is the best there is (reverse water-filling), once the banks count in one unit: the
nats that gradients say an error of a layer's output costs, or else its square as a share of that output.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from globe.bank.feedback import elimination
from globe.bank.precision import Precision
from globe.bank.rounding import MOST_BITS, NOISE
from globe.bank.steps import coded_bits
from globe.checkpoint import Checkpoint
from globe.config.choices import WEIGHT_METHODS
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.fit.calibrated import observed_members
from globe.fit.observed import Observed
from globe.fit.plan import Outline, resolve_sizes
from globe.numerics.chunks import expert_chunks
from globe.numerics.input_metric import InputMetric
from globe.sizes.chosen import byte_room_of
from globe.sizes.curves import spectrum
from globe.sizes.sizing import Sizing

_log = logging.getLogger(__name__)
_LEAST_CODED = 0.25
"""Bits of an entry, on average, that coded adapters get at least; those of other ones are whole and at least 1."""
_FINE = 16
"""Classes of energies to a factor of two."""
_SPAN = 64
"""Factors of two that the classes span; what is below counts as nothing."""


@dataclass(frozen=True, slots=True)
class Bank:
    """How many entries of one bank have which energy, in classes of its total, and what the total counts for."""

    outline: Outline
    counts: Float[Tensor, " classes"]
    weight: float
    m: int
    r: int
    coded: bool = False

    def bits(self, level: float) -> float:
        """Return the bits of an entry on average, where each further one has to gain `level`."""
        gain = torch.tensor([NOISE[b] - NOISE[b + 1] for b in range(MOST_BITS)], dtype=torch.float64)
        energies = self.weight * torch.exp2(-torch.arange(len(self.counts), dtype=torch.float64) / _FINE)
        each = (energies[:, None] * gain > level).sum(dim=1)
        if self.coded:  # steps that are equal once they are weighted, in whatever unit
            each = coded_bits(energies / level)
        return float((self.counts * each).sum()) / (self.outline.n * self.outline.p * self.r)

    def share(self, level: float, config: Config) -> float:
        """Return the share of the bfloat16 bytes of its experts that the bank takes then."""
        n, p, d = self.outline.shape
        average = min(float(MOST_BITS), max(_LEAST_CODED if self.coded else 1.0, self.bits(level)))
        atoms = min(8, max(5, math.ceil(average) + 3))
        precision = Precision(average, atoms, None, config.bank.group_B, self.coded)
        return (precision.bits(n, p, d, self.m, self.r, None) + 64) / (16 * n * p * d)


def spread_bytes(config: Config, banks: Sequence[Outline], sizing: Sizing) -> dict[str, float]:
    """Choose the share of its bytes that every bank gets, by key, so that all together take `bank.size` at most.

    Without a calibration all banks' relative errors count alike. Raises ConfigError where the share is too small.
    """
    found = []
    for bank in banks:
        joined, metric = sizing.read(config, bank)
        observed = observed_members(config, sizing.checkpoint, bank, sizing.calibration)
        weight = _weight(sizing.checkpoint, observed)
        if config.method in WEIGHT_METHODS:  # no atoms, and columns that are all alike
            found.append(Bank(bank, _classes(joined.experts, metric, None), weight, 0, bank.d))
        else:
            sizes = resolve_sizes(config, bank)
            found.append(
                Bank(
                    bank,
                    _classes(joined.experts, metric, sizes.r),
                    weight,
                    sizes.m,
                    sizes.r,
                    config.bank.coded,
                )
            )
        del joined, metric
    size = config.bank.size
    assert size is not None
    numbers = [one.outline.n * one.outline.p * one.outline.d for one in found]

    def used(level: float) -> float:
        return sum(one.share(level, config) * count for one, count in zip(found, numbers, strict=True))

    low, high = 1e-30, max(one.weight for one in found)
    if used(high) > size * sum(numbers):
        byte_room_of(config, banks[0])  # raises, where the share is too small for any bank
        raise ConfigError(f"bank.size={size} leaves less than a bit for each number: give a larger share")
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if used(middle) <= size * sum(numbers) else (middle, high)
    shares = {one.outline.key: one.share(high, config) for one in found}
    for key, share in shares.items():
        _log.info("%s: %.4f of its bytes", key, share)
    return shares


def _classes(
    X: Float[Tensor, "n p d"], metric: InputMetric | None, r: int | None
) -> Float[Tensor, " classes"]:
    """Return how many entries of the adapters have which share of a bank's energy, the largest first.

    Without r the weights themselves are meant, and their rotated columns share the energy of a row evenly.
    """
    V = spectrum(X, metric).vectors[:, :r]
    counts, total = torch.zeros(_FINE * _SPAN, dtype=torch.float64), float(X.double().square().sum())
    for part in expert_chunks(*X.shape):
        seen = X[part] if metric is None else metric.seen(X[part], part)
        energies = (_conditional(X[part], metric, part, V) if _is_coupled(metric) else seen @ V).square()
        if r is None:
            energies = energies.mean(dim=2, keepdim=True).expand_as(energies)
        place = (
            (-(energies.double() / max(total, 1e-300)).clamp_min(2.0**-_SPAN).log2() * _FINE).round().long()
        )
        counts += torch.bincount(place.flatten().clamp(0, len(counts) - 1).cpu(), minlength=len(counts))
    return counts


def _is_coupled(metric: InputMetric | None) -> bool:
    return metric is not None and metric.rows is not None and metric.rows.dim() == 3


def _conditional(
    X: Float[Tensor, "c p d"], metric: InputMetric | None, part: slice, V: Float[Tensor, "d r"]
) -> Float[Tensor, "c p r"]:
    """Return rows that are inputs by what of each the others can't make good: the pivots of their second moment."""
    assert metric is not None
    assert metric.rows is not None
    H = metric.rows[part].mT @ metric.rows[part]
    pivots = (
        elimination(H).diagonal(dim1=1, dim2=2).reciprocal() * H.diagonal(dim1=1, dim2=2).mean(1, True).sqrt()
    )
    return metric.bases(X, part) @ V * pivots[:, :, None]


def _weight(checkpoint: Checkpoint, observed: Sequence[Observed]) -> float:
    """Return what of the output of a bank's layers hangs on its experts; 1 without a text.

    To first order, sum_i g_i^2 E ||J_i W_i x||^2 for gate and up, with the slopes J_i of the output, and for down the
    whole output. Where gradients weight its directions that is in nats, up to one factor for all layers; without them
    it is a share of the whole.
    """
    own = whole = 0.0
    for member in observed:
        s = member.statistics
        down = checkpoint.read_experts(s.layer, "down").weights.float()
        F = None if s.output is None else s.output.matrix.float()
        outputs = [_energy(down[at].mT, s.inner.dense([at])[0], F) for at in range(s.inner.n)]
        whole += float(s.gate2.double() @ torch.stack(outputs))
        if member.is_down:
            own = whole
            continue
        rows = s.rows(member.family)
        weights = checkpoint.read_experts(s.layer, member.family).weights.float()
        each = torch.stack([_seen(weights[at], s.inputs.dense([at])[0]) for at in range(s.inputs.n)])
        own += float(s.gate2.double() @ (rows * each).sum(dim=1))
    if any(member.statistics.output is not None for member in observed):
        return own
    return own / whole if whole > 0 else 1.0


def _energy(W: Float[Tensor, "d p"], H: Float[Tensor, "p p"], F: Float[Tensor, "d d"] | None) -> Tensor:
    """Return tr(F W H W^T)."""
    return _seen(W, H).sum() if F is None else ((F @ W @ H) * W).double().sum()


def _seen(W: Float[Tensor, "rows q"], C: Float[Tensor, "q q"]) -> Float[Tensor, " rows"]:
    return ((W @ C) * W).double().sum(dim=1)
