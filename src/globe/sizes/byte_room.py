"""Which sizes and bits fill a budget of bytes: (m, r, k) and the bits of adapters and atoms. Integers only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from globe.bank.precision import Precision
from globe.errors import ConfigError
from globe.fit.plan import BankSize

FILLED = 0.995
"""Share of the budget that sizes have to fill, where any do."""
AVERAGES = (3.0, 2.25, 4.0, 1.6, 5.5)
"""Average bits of the adapters that are tried, the first one for every number of atoms."""
ATOM_BITS = (8, 7, 6, 5)
_LEAST, _MOST = 1.0, 8.0
_LEAST_CODED = 0.25
"""Bits of an entry on average, where most of them may be 0."""


@dataclass(frozen=True, slots=True)
class ByteRoom:
    """What a bank may be: experts of n x p x d, and bits of its adapters, atoms and codes in a file."""

    n: int
    p: int
    d: int
    bits: int
    group_adapters: int | None = None
    group_atoms: int = 64
    wide: bool = False
    """whether a basis may have more rows than an expert, up to d"""
    coded: bool = False
    """whether the integers of the adapters are coded by their surprise"""

    def precision(self, size: BankSize) -> Precision:
        assert size.bits_A is not None
        assert size.bits_B is not None
        return Precision(size.bits_A, size.bits_B, self.group_adapters, self.group_atoms, self.coded)

    def count(self, size: BankSize) -> int:
        """Return the bits that factors of this size take in a file."""
        return self.precision(size).bits(self.n, self.p, self.d, size.m, size.r, size.atom_rank)

    def filled(self, m: int, average: float, k: int | None = None) -> BankSize | None:
        """Return sizes near an average of bits that leave less than half a percent, or else the least; None if nothing
        fits.

        Bytes of a row of the adapters are whole where all rows are alike, which is coarse. So every number of rows
        gets the bits that are left, and among those that fill the room the average nearest to the one asked for wins.
        """
        found = [one for one in self._all(m, k) if self.count(one) <= self.bits]
        if not found:
            return None
        full = [one for one in found if self.count(one) >= FILLED * self.bits]
        if full:
            return min(full, key=lambda one: abs(math.log((one.bits_A or 1) / average)))
        return max(found, key=self.count)

    def given(self, m: int, r: int) -> BankSize | None:
        """Return these sizes with the bits that are left for them: 3 more for the atoms than for the adapters, 8 at
        most.

        None where they leave less than a bit.
        """
        found = [one for atoms in ATOM_BITS if (one := self._with_bits(m, r, None, atoms)) is not None]
        wanted = [one for one in found if one.bits_B == min(8, max(5, math.ceil(one.bits_A or 1) + 3))]
        return next(iter(wanted or found[::-1]), None)

    def _all(self, m: int, k: int | None) -> Iterator[BankSize]:
        """Yield every number of rows, with the most bits for the adapters that there is room for."""
        most = self.d if self.wide and k is None else min(self.p, self.d)
        for atoms in ATOM_BITS:
            for r in range(1 if k is None else k + 1, most + 1):
                if (size := self._with_bits(m, r, k, atoms)) is not None:
                    yield size

    def _with_bits(self, m: int, r: int, k: int | None, atoms: int) -> BankSize | None:
        least = _LEAST_CODED if self.coded else _LEAST
        rest = self.count(BankSize(m, r, k, 1.0, atoms)) - self.n * self.p * self._row(r)
        row_bits = (self.bits - rest) // (self.n * self.p)
        if self.group_adapters is not None:
            row_bits -= row_bits % 8
        average = min(_MOST, row_bits / r)
        return BankSize(m, r, k, average, atoms) if average >= least else None

    def _row(self, r: int) -> int:
        """Return the fewest bits of a row: in whole bytes where rows are alike, as rows of levels are on the whole."""
        return r if self.group_adapters is None else 8 * -(-r // 8)


def least_share(room: ByteRoom) -> float:
    """Share of the experts' bfloat16 bytes that the smallest bank takes."""
    smallest = room.count(BankSize(1, 1, None, _LEAST, min(ATOM_BITS)))
    return smallest / (16 * room.n * room.p * room.d)


def too_small(share: float, room: ByteRoom) -> ConfigError:
    """Return the sentence for a share of bytes in which nothing fits."""
    least = math.ceil(1000 * least_share(room)) / 1000
    return ConfigError(
        f"bank.size={share} is too small for {room.n} experts of {room.p} x {room.d}: give a share from {least:g}"
    )
