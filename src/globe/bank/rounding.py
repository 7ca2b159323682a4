"""Round matrices to integers of a few bits: groups of columns share a scale in every row.

A row w of k columns is cut into groups of `group` columns. Column j of b_j bits is stored as an integer q_j in
0 .. 2^b_j - 1 and read back as (q_j - z_j) s, z_j = (2^b_j - 1) / 2, with one scale s, in bfloat16, for the group and
row: levels lie at .., -s/2, s/2, .. as far as the bits reach, so columns of more bits reach farther in steps of the
same size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

MOST_BITS = 8
SCALE_DTYPE = torch.bfloat16
NOISE = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104, 0.0003043, 0.00008769)
"""Mean squared error of the best uniform grid of 0, 1, .. 8 bits on normal numbers of variance 1 (Max 1960, table II).
Other distributions and shared scales differ by some ten per cent."""
STEP = (1.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.05687, 0.03076)
"""The scale of that grid; for 0 bits there is none."""
LARGEST = 15_000
"""Of the integers of coded numbers."""
FRUGAL, _FARTHEST = 0.6, 0.25
"""What bits weigh where integers are coded, as a share of what a bit gains in a fine step, and how many steps an
integer is drawn to 0 for them at most. Normal numbers alone want more of both; errors of banks were the least here."""
_TRIED = 18
_SHORTEST, _LONGEST = 0.45, 2.2
"""Scales that the search tries, as shares of the one that the group's root mean square suggests."""


class Grid(NamedTuple):
    """How the columns of a matrix are rounded."""

    bits: tuple[int, ...]
    """of each column, 0 to 8; a column of 0 bits is read back as zero"""
    group: int
    """columns that share a scale; the last group may have fewer"""

    @classmethod
    def of(cls, bits: int | Sequence[int], k: int, group: int) -> Grid:
        """Return one number of bits for all of k columns, or one for each. Raises ValueError where they do not fit."""
        each = (bits,) * k if isinstance(bits, int) else tuple(bits)
        if len(each) != k or not all(0 <= b <= MOST_BITS for b in each) or group < 1:
            raise ValueError(
                f"bits={bits!r} do not fit {k} columns in groups of {group}: give 0 to {MOST_BITS} for each"
            )
        return cls(each, group)

    @property
    def groups(self) -> Iterator[slice]:
        """The columns of each group."""
        for start in range(0, len(self.bits), self.group):
            yield slice(start, min(len(self.bits), start + self.group))

    @property
    def group_count(self) -> int:
        """Number of groups."""
        return -(-len(self.bits) // self.group)

    def nbits(self, rows: int) -> int:
        """Return the bits of so many rounded rows: integers, and scales of 16 bits."""
        return rows * (sum(self.bits) + 16 * self.group_count)

    def top(self, like: Tensor) -> Float[Tensor, " k"]:
        """Return the largest integer of each column."""
        return torch.tensor([2**b - 1 for b in self.bits], dtype=like.dtype, device=like.device)

    def of_rows(self, rows: Any) -> Grid:
        """Return the grid of some of the first axis: the same, since all rows are alike."""
        return self

    def spread(self, per_group: Shaped[Tensor, "*rows groups"]) -> Shaped[Tensor, "*rows k"]:
        """Repeat what there is once a group for each of its columns."""
        return per_group.repeat_interleave(self.group, dim=-1)[..., : len(self.bits)]


class _OneGroup:
    """A grid whose rows each have one scale, for all `group` columns."""

    __slots__ = ()
    if TYPE_CHECKING:

        @property
        def group(self) -> int: ...

    @property
    def groups(self) -> Iterator[slice]:
        """The only group."""
        yield slice(0, self.group)

    @property
    def group_count(self) -> int:
        """One."""
        return 1

    def spread(self, per_group: Shaped[Tensor, "*rows 1"]) -> Shaped[Tensor, "*rows k"]:
        """Repeat what there is once a row for each of its columns."""
        return per_group.expand(*per_group.shape[:-1], self.group)


@dataclass(frozen=True, slots=True, eq=False)
class LevelGrid(_OneGroup):
    """How the columns of matrices are rounded whose rows differ in what they matter: a row of level l has the bits
    `tables[l]`, and one scale, on a symmetric grid."""

    tables: tuple[tuple[int, ...], ...]
    levels: UInt8[Tensor, "*rows"]

    @property
    def group(self) -> int:
        """All columns share a scale."""
        return len(self.tables[0])

    def nbits(self, rows: int) -> int:
        """Return the bits of the integers, the scales and the levels of all rows, each row in whole bytes."""
        counts = torch.bincount(self.levels.flatten().long(), minlength=len(self.tables)).tolist()
        return sum(
            count * (row_width(table) * 8 + 24) for count, table in zip(counts, self.tables, strict=True)
        )

    def top(self, like: Tensor) -> Float[Tensor, "*rows k"]:
        """Return the largest integer of each entry."""
        tops = torch.tensor([[2**b - 1 for b in table] for table in self.tables], dtype=like.dtype)
        return tops.to(like.device)[self.levels.long()]

    def flipped(self) -> LevelGrid:
        """Return the grid of the columns in reverse order."""
        return LevelGrid(tuple(table[::-1] for table in self.tables), self.levels)

    def of_rows(self, rows: Any) -> LevelGrid:
        """Return the grid of some of the first axis."""
        return LevelGrid(self.tables, self.levels[rows])


@dataclass(frozen=True, slots=True, eq=False)
class StepGrid(_OneGroup):
    """How matrices are rounded whose integers are coded by their surprise: every row has a step of its own, given in
    advance, and all columns have integers of both signs, so that 0 is read back as 0."""

    group: int
    """all columns share the step"""
    exponents: UInt8[Tensor, "*rows"]
    """e of each row: its step is 2^(e/2)"""
    sizes: tuple[Float[Tensor, "*rows"], Float[Tensor, " k"]] | None = None
    """what to expect of the squares of the numbers in steps: the product of a row's and a column's share. With these
    integers are chosen by their bits too."""

    @property
    def scale(self) -> Shaped[Tensor, "*rows 1"]:
        """Return the steps, in bfloat16."""
        e = self.exponents.long()[..., None]
        odd = torch.where(e % 2 > 0, 1.4140625, 1.0)
        return torch.ldexp(odd, e // 2).to(SCALE_DTYPE)

    def top(self, like: Tensor) -> Float[Tensor, " k"]:
        """Return the largest code of each column."""
        return torch.full((self.group,), 2.0 * LARGEST, dtype=like.dtype, device=like.device)

    def pull(self, like: Tensor) -> Float[Tensor, "*rows k"] | None:
        """Return c of every entry: the integer q of a number of x steps is the one of the least (x - q)^2 + c q^2.

        A normal number of variance v takes q^2 / (2 v ln 2) bits more than 0 does, and a bit is worth 2 ln 2 / 12 of
        a squared step where steps are fine, which makes c = 1 / (12 v).
        """
        if self.sizes is None:
            return None
        rows, columns = (one.to(like) for one in self.sizes)
        return FRUGAL / 12 / (rows[..., None] * columns).clamp_min(1e-12)

    def flipped(self) -> StepGrid:
        """Return the grid of the columns in reverse order."""
        sizes = None if self.sizes is None else (self.sizes[0], self.sizes[1].flip(0))
        return replace(self, sizes=sizes)

    def of_rows(self, rows: Any) -> StepGrid:
        """Return the grid of some of the first axis."""
        sizes = None if self.sizes is None else (self.sizes[0][rows], self.sizes[1])
        return StepGrid(self.group, self.exponents[rows], sizes)


AnyGrid = Grid | LevelGrid | StepGrid


def row_width(bits: Sequence[int]) -> int:
    """Return the bytes of the packed integers of a row."""
    return -(-sum(bits) // 8)


class Rounded(NamedTuple):
    """Integers and scales of a matrix, or of many: the last axis is that of the columns."""

    codes: Shaped[Tensor, "*rows k"]
    """in 8 bits; in 16 those of a StepGrid"""
    scale: Shaped[Tensor, "*rows groups"]
    """in bfloat16"""
    grid: AnyGrid

    def values(self) -> Float[Tensor, "*rows k"]:
        """Return the numbers that the integers stand for, in float32."""
        levels = self.codes.float()
        return (levels - self.grid.top(levels) / 2) * self.grid.spread(self.scale.float())

    @property
    def nbits(self) -> int:
        """Bits that integers and scales take, where they are packed."""
        assert not isinstance(self.grid, StepGrid)
        return self.grid.nbits(self.codes.numel() // max(1, self.codes.shape[-1]))


def round_nearest(W: Float[Tensor, "*rows k"], grid: AnyGrid, *, searched: bool = True) -> Rounded:
    """Round every entry to the nearest level of its group.

    searched   choose the scale of every group by least squares among `_TRIED` candidates, and then the best multiple
               of the levels that the best of them gives; without it, the scale reaches the group's largest entry

    The scale of a group of zeros is 0.
    """
    codes, scales = no_codes(grid, W), []
    top, pull = grid.top(W), pull_of(grid, W)
    for part in grid.groups:
        own = W[..., part]
        scale = scale_of(grid, own, top[..., part], searched=searched)
        codes[..., part] = nearest_level(own, scale, top[..., part], part_of(pull, part))
        scales.append(scale)
    return Rounded(codes, torch.stack(scales, dim=-1).to(SCALE_DTYPE), grid)


def scale_of(
    grid: AnyGrid, W: Float[Tensor, "*rows g"], top: Float[Tensor, ...], *, searched: bool = True
) -> Float[Tensor, "*rows"]:
    """Return the scale of each row for one group of columns: the step that is given, or what `group_scale` finds."""
    if isinstance(grid, StepGrid):
        return grid.scale[..., 0].to(W)
    return group_scale(W, top, searched=searched)


def pull_of(grid: AnyGrid, like: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows k"] | None:
    """Return how strongly each integer is drawn to 0 (`StepGrid.pull`); None where bits are set apart."""
    return grid.pull(like) if isinstance(grid, StepGrid) else None


def part_of(pull: Tensor | None, part: slice | list[int]) -> Tensor | None:
    """Return the columns of a pull, if there is one."""
    return None if pull is None else pull[..., part]


def no_codes(grid: AnyGrid, like: Tensor) -> Tensor:
    """Return an empty tensor for the codes of such a grid."""
    dtype = torch.int16 if isinstance(grid, StepGrid) else torch.uint8
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def nearest_level(
    W: Float[Tensor, "*rows g"],
    scale: Float[Tensor, "*rows"],
    top: Float[Tensor, ...],
    pull: Float[Tensor, ...] | None = None,
) -> Float[Tensor, "*rows g"]:
    """Return the codes of the nearest levels; those of a zero scale are as near to the middle as they can be.

    pull   draws numbers of x steps to x / (1 + pull) first, but at most `_FARTHEST`
    """
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    x = W * inverse[..., None]
    if pull is not None:
        x = x - (x * (pull / (1 + pull))).clamp_(-_FARTHEST, _FARTHEST)
    levels = torch.round(x + top / 2)
    return torch.minimum(levels.clamp_min_(0), top)


def pull_cost(q: Tensor, pull: Tensor) -> Tensor:
    """Return what integers cost by their pull, in squared steps."""
    size = q.abs()
    return torch.where(
        pull * size < _FARTHEST, pull * size.square(), 2 * _FARTHEST * size - _FARTHEST**2 / pull
    )


def group_scale(
    W: Float[Tensor, "*rows g"], top: Float[Tensor, ...], *, searched: bool
) -> Float[Tensor, "*rows"]:
    """Return the scale of each row for one group of columns, in the dtype of W but a number of bfloat16.

    `top` is the largest integer of each column, or of each entry.
    """
    used = top > 0
    if not bool(used.any()):
        return torch.zeros_like(W[..., 0])
    whole = _storable((2 * W.abs() / top.clamp_min(1) * used).amax(dim=-1))
    if not searched:
        return whole
    step = torch.tensor(STEP, dtype=W.dtype, device=W.device)[(top + 1).log2().round().long()]
    usual = ((W * step).square() * used).sum(dim=-1).div(used.sum(dim=-1).clamp_min(1)).sqrt()
    best, error = whole, _error(W, whole, top)
    for at in range(_TRIED):
        factor = _SHORTEST * (_LONGEST / _SHORTEST) ** (at / (_TRIED - 1))
        best, error = _better(W, top, best, error, _storable(usual * factor))
    return _fitted(W, top, best, error)


def _fitted(W: Tensor, top: Tensor, scale: Tensor, error: Tensor) -> Tensor:
    """Return the best multiple of the levels that a scale gives, where it is any better."""
    levels = nearest_level(W, scale, top) - top / 2
    size = levels.square().sum(dim=-1)
    found = torch.where(size > 0, (W * levels).sum(dim=-1) / size.clamp_min(1e-30), scale)
    return _better(W, top, scale, error, _storable(found.clamp_min(0)))[0]


def _better(W: Tensor, top: Tensor, held: Tensor, error: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return, row by row, the scale with the smaller error, and that error."""
    found = _error(W, scale, top)
    wins = found < error
    return torch.where(wins, scale, held), torch.where(wins, found, error)


def _error(W: Tensor, scale: Tensor, top: Tensor) -> Float[Tensor, "*rows"]:
    levels = nearest_level(W, scale, top) - top / 2
    return (W - levels * scale[..., None]).square().sum(dim=-1)


def _storable(scale: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    return scale.to(SCALE_DTYPE).to(scale)
