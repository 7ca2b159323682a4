"""Which sizes fill a budget: (m, r) with dense atoms, (m, r, k) with low-rank ones. Integers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from globe.am.records import Sizes
from globe.errors import ConfigError
from globe.fit.plan import BankSize

MOST_ADAPTERS, LEAST_ADAPTERS = 0.85, 0.35
"""Shares of the budget that adapters take where atoms are of low rank. The best ones lay between 0.6 and 0.75 on 16
and on 60 trained experts."""


@dataclass(frozen=True, slots=True)
class Room:
    """What sizes may be: experts of n x p x d, and at most `limit` numbers in adapters, atoms and codes."""

    n: int
    p: int
    d: int
    limit: int

    def parameters(self, size: BankSize) -> int:
        return Sizes(self.n, self.p, self.d, size.m, size.r, atom_rank=size.atom_rank).parameters

    def dense(self, m: int, allows: Callable[[int], bool] = lambda m: True) -> BankSize | None:
        """Return the most rows that m dense atoms can have, and then the most atoms that are allowed; None if nothing
        fits.

        Where m is not allowed the nearest number of atoms that is stands in for it.
        """
        n, p, d, limit = self.n, self.p, self.d, self.limit
        near = next(
            (one for one in sorted(range(1, n + 1), key=lambda one: abs(one - m)) if allows(one)), None
        )
        if near is None:
            return None
        r = min(p, d, (limit - n * near) // (n * p + near * d))
        if r < 1:
            return None
        most = min(n, (limit - n * p * r) // (r * d + n))
        return BankSize(next(one for one in range(most, 0, -1) if allows(one)), r, None)

    def low_rank(self, k: int, allows: Callable[[int], bool] = lambda m: True) -> BankSize | None:
        """Return the most rows of n atoms of rank k; None if none fit, or if dense atoms would be smaller.

        Where there is room for more rows than an expert has the rank is as high as fits.
        """
        n, p, d, limit = self.n, self.p, self.d, self.limit
        r = min(p, d, (limit - n * n - n * k * d) // (n * p + n * k))
        if r == min(p, d):
            most = (limit - n * n - n * p * r) // (n * (r + d))
            k = max(k, min(most, (r * d - 1) // (r + d)))
        return BankSize(n, r, k) if r > k >= 1 and k * (r + d) < r * d and allows(n) else None

    def rank_of_share(self, share: float) -> int:
        """Return k of n atoms when adapters take a share of the budget."""
        n, p, d, limit = self.n, self.p, self.d, self.limit
        r = share * limit / (n * p)
        return max(1, round((limit - n * p * r - n * n) / (n * (r + d))))

    def shrunk(self, factor: float) -> Room:
        """Return a block of the experts: fewer rows and columns, and the same share of their numbers."""
        p, d = max(1, round(self.p / factor)), max(1, round(self.d / factor))
        return Room(self.n, p, d, self.limit * p * d // (self.p * self.d))


def candidates(
    room: Room, *, ratio: float, low_rank: bool, allows: Callable[[int], bool] = lambda m: True
) -> tuple[BankSize, ...]:
    """Return the sizes that leave no room for another atom or row: dense ones from one atom to n, then low-rank ones.

    Numbers of dense atoms and ranks of low-rank ones (m = n) stand on geometric grids whose steps are `ratio`;
    `allows(m)` can leave numbers of atoms out. Empty if nothing fits.
    """
    found = [room.dense(m, allows) for m in grid(1, room.n, ratio)]
    if low_rank:
        least, most = room.rank_of_share(MOST_ADAPTERS), room.rank_of_share(LEAST_ADAPTERS)
        found += [room.low_rank(k, allows) for k in grid(least, max(least, most), ratio)]
    return tuple(dict.fromkeys(size for size in found if size is not None))


def neighbours(
    room: Room, size: BankSize, seen: Sequence[BankSize], *, allows: Callable[[int], bool] = lambda m: True
) -> tuple[BankSize, ...]:
    """Return halfway (geometrically) from a candidate to the next ones of its kind on both sides among those seen."""
    low_rank = size.atom_rank is not None

    def place(one: BankSize) -> int:
        return one.m if one.atom_rank is None else one.atom_rank

    others = [place(one) for one in seen if (one.atom_rank is not None) == low_rank]
    below = max((other for other in others if other < place(size)), default=None)
    above = min((other for other in others if other > place(size)), default=None)
    halfway = [round((place(size) * other) ** 0.5) for other in (below, above) if other is not None]
    found = [room.low_rank(k, allows) if low_rank else room.dense(k, allows) for k in halfway]
    return tuple(dict.fromkeys(one for one in found if one is not None and one not in seen))


def resized(
    room: Room, size: BankSize, block: Room, *, allows: Callable[[int], bool] = lambda m: True
) -> BankSize:
    """Return the sizes in `room` for `size` in a block of it: as many atoms, rows in proportion, filled up."""
    if size.atom_rank is None:
        tries = (room.dense(m, allows) for m in range(size.m, 0, -1))
    else:
        scaled = max(1, round(size.atom_rank * room.p / block.p))
        tries = (room.low_rank(k, allows) for k in range(scaled, 0, -1))
    found = next((one for one in tries if one is not None), None) or room.dense(1, allows)
    assert found is not None, "a room with candidates has room for the fewest atoms"
    return found


def too_small(kept: float, room: Room, *, means: int) -> ConfigError:
    """Return the sentence for a share in which nothing fits."""
    n, p, d = room.n, room.p, room.d
    least = (room.parameters(BankSize(1, 1, None)) + means) / (n * p * d)
    return ConfigError(
        f"bank.kept={kept} is too small for {n} experts of {p} x {d}: give a share from "
        f"{-(-least * 10_000 // 1) / 10_000:.4f} (one atom of one row) to 1"
    )


def grid(first: int, last: int, ratio: float) -> list[int]:
    """Return whole numbers from first to last, each about `ratio` times the one before."""
    numbers, value = [first], float(first)
    while (value := max(value * ratio, value + 1)) < last:
        numbers.append(round(value))
    return numbers if numbers[-1] >= last else [*numbers, last]
