"""How many bits the factors of a bank have, what they take, and the ridge that makes a fit fit for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from globe.bank.rounding import NOISE

_FEEDBACK = 0.25
"""Share of the noise of plain rounding that is left with feedback, for the ridge: of bits 3 and 4, SiLU and tanh, the
best ridges of a trained layer lay at 0.1 to 0.3 of that noise."""
_FEEDBACK_OF_ROWS = 0.02
"""The same where bits are shared out over rows: those that matter have many, and want hardly any ridge."""
_FEEDBACK_OF_CODED, _LEAST_RIDGE = 5e-4, 2e-6
"""The same where integers are coded, which are drawn to 0 by themselves; and a ridge that float32 can do with."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits of the factors: of an adapter's columns on average, of every number of an atom, and columns of a group."""

    adapters: float
    atoms: int
    group_adapters: int | None = None
    """None is all columns"""
    group_atoms: int = 64
    coded: bool = False
    """Integers of the adapters are coded by their surprise (`globe.bank.coded`)"""

    @property
    def ridge(self) -> float:
        """Relative ridge of the adapters' refit: what rounding them is expected to cost in the metric of the bases.

        Noise of variance v |A|^2 / (p r) an entry costs v |A|^2 mean(diag M M^T), which is a ridge of v.
        """
        low = int(self.adapters)
        share = self.adapters - low
        noise = NOISE[low] ** (1 - share) * NOISE[min(low + 1, len(NOISE) - 1)] ** share
        if self.coded:
            return max(_LEAST_RIDGE, _FEEDBACK_OF_CODED * noise)
        return (_FEEDBACK_OF_ROWS if self.group_adapters is None else _FEEDBACK) * noise

    def row_bits(self, r: int) -> int:
        """Return the bits of the integers of an adapter's row, to be shared out over its r columns."""
        return math.floor(self.adapters * r + 1e-6)

    def bits(self, n: int, p: int, d: int, m: int, r: int, k: int | None) -> int:
        """Return the bits that such factors take in a file: rows of whole bytes, scales and codes of 16 bits."""
        if self.coded:  # a byte for each row, numbers and spreads of columns, bases and ends of experts
            adapters = n * p * (self.row_bits(r) + 8) + 24 * r + 48 * n
        elif self.group_adapters is None:  # rows of different bits, each with its scale and level
            adapters = n * p * (self.row_bits(r) + 24) + 16 * r
        else:
            adapters = n * p * (8 * -(-self.row_bits(r) // 8) + 16 * -(-r // self.group_adapters)) + 16 * r
        if k is None:
            atoms = m * r * _row_bits(d, self.atoms, self.group_atoms)
        else:
            atoms = m * r * _row_bits(k, self.atoms, self.group_atoms)
            atoms += m * k * _row_bits(d, self.atoms, self.group_atoms)
        return adapters + atoms + 16 * n * m


def _row_bits(columns: int, bits: int, group: int) -> int:
    return 8 * -(-columns * bits // 8) + 16 * -(-columns // group)
