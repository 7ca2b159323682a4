"""How much less a bank of several atoms leaves than the shared basis whose curve is known in closed form.

The ratio differs between families and sizes, so a budget that is spread by the closed form alone gives some banks too
much. Three short fits tell it, in a block of large experts as the search for sizes takes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float
from torch import Tensor

from globe.config.choices import Method
from globe.config.schema import Config, is_linear
from globe.numerics.input_metric import InputMetric
from globe.sizes.budget import Room
from globe.sizes.chosen import allows
from globe.sizes.curves import spectrum
from globe.sizes.search import FEWEST_STEPS, block_of, plan_search, short_error

SHARES = (0.25, 0.5, 0.75)
"""Shares of a bank's numbers at which the ratio is measured."""
ATOMS = 8
"""Dense atoms of the short fits; about as many win in a metric of inputs."""
_LEAST = 1e-3


@dataclass(frozen=True, slots=True)
class Gain:
    """Squared error of a fit over that of the shared basis of the same size, 0 to 1, at some shares in order."""

    shares: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()

    def at(self, share: float) -> float:
        """Return the ratio at a share: between two measured ones by their logarithms, beyond them the nearest one's."""
        if not self.shares:
            return 1.0
        return math.exp(np.interp(share, self.shares, np.log(self.ratios)))


def measure_gain(X: Float[Tensor, "n p d"], metric: InputMetric | None, config: Config) -> Gain:
    """Return the gain for normalised experts of a bank by short fits; none for methods other than GloBE."""
    found: dict[float, float] = {}
    for share in SHARES if config.method is Method.globe else ():
        n, p, d = X.shape
        room = Room(n, p, d, int(share * n * p * d))
        own = replace(config, bank=replace(config.bank, kept=share))
        admitted = partial(allows, own)
        if room.dense(ATOMS, admitted) is None:
            continue
        block = plan_search(room, own, admitted).look.block
        size = block.dense(min(ATOMS, block.n), admitted)
        part, seen_by = (X, metric) if block is room else block_of(X, metric, block, config.seed)
        basis = spectrum(part, seen_by)
        left = basis.error(block.limit)
        if size is None or left <= 0:
            continue
        columns = None
        if seen_by is not None:
            part = seen_by.seen(part, slice(0, len(part)))
            columns = seen_by.kernel(linear=is_linear(config))
        steps = min(FEWEST_STEPS, config.train.steps)
        error = short_error(part, columns, block, size, own, steps, config.seed)
        found[share] = min(1.0, max(_LEAST, error**2 / left))
    return Gain(tuple(found), tuple(found.values()))
