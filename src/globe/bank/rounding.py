"""Round matrices to integers of a few bits: groups of columns share a scale in every row.

A row w of k columns is cut into groups of `group` columns. Column j of b_j bits is stored as an integer q_j in
0 .. 2^b_j - 1 and read back as (q_j - z_j) s, z_j = (2^b_j - 1) / 2, with one scale s, in bfloat16, for the group and
row: levels lie at .., -s/2, s/2, .. as far as the bits reach, so columns of more bits reach farther in steps of the
same size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    advance, and integers from -127 to 127 for all columns, so that 0 is read back as 0."""

    group: int
    """all columns share the step"""
    exponents: UInt8[Tensor, "*rows"]
    """e of each row, 0 to 15: its step is 2^(e/2)"""

    @property
    def scale(self) -> Shaped[Tensor, "*rows 1"]:
        """Return the steps, in bfloat16."""
        steps = torch.tensor([2 ** (e // 2) * (1.0, 1.4140625)[e % 2] for e in range(16)], dtype=SCALE_DTYPE)
        return steps.to(self.exponents.device)[self.exponents.long()][..., None]

    def top(self, like: Tensor) -> Float[Tensor, " k"]:
        """Return the largest code of each column."""
        return torch.full((self.group,), 254.0, dtype=like.dtype, device=like.device)

    def flipped(self) -> StepGrid:
        """Return the grid of the columns in reverse order."""
        return self

    def of_rows(self, rows: Any) -> StepGrid:
        """Return the grid of some of the first axis."""
        return StepGrid(self.group, self.exponents[rows])


AnyGrid = Grid | LevelGrid | StepGrid


def row_width(bits: Sequence[int]) -> int:
    """Return the bytes of the packed integers of a row."""
    return -(-sum(bits) // 8)


class Rounded(NamedTuple):
    """Integers and scales of a matrix, or of many: the last axis is that of the columns."""

    codes: UInt8[Tensor, "*rows k"]
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
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    scales = []
    top = grid.top(W)
    for part in grid.groups:
        own = W[..., part]
        scale = scale_of(grid, own, top[..., part], searched=searched)
        codes[..., part] = nearest_level(own, scale, top[..., part])
        scales.append(scale)
    return Rounded(codes, torch.stack(scales, dim=-1).to(SCALE_DTYPE), grid)


def scale_of(
    grid: AnyGrid, W: Float[Tensor, "*rows g"], top: Float[Tensor, ...], *, searched: bool = True
) -> Float[Tensor, "*rows"]:
    """Return the scale of each row for one group of columns: the step that is given, or what `group_scale` finds."""
    if isinstance(grid, StepGrid):
        return grid.scale[..., 0].to(W)
    return group_scale(W, top, searched=searched)


def nearest_level(
    W: Float[Tensor, "*rows g"], scale: Float[Tensor, "*rows"], top: Float[Tensor, ...]
) -> UInt8[Tensor, "*rows g"]:
    """Return the integers of the nearest levels; those of a zero scale are as near to the middle as they can be."""
    return _levels(W, scale, top).to(torch.uint8)


def _levels(W: Tensor, scale: Tensor, top: Tensor) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    levels = torch.round(W * inverse[..., None] + top / 2)
    return torch.minimum(levels.clamp_min_(0), top)


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
    levels = _levels(W, scale, top) - top / 2
    size = levels.square().sum(dim=-1)
    found = torch.where(size > 0, (W * levels).sum(dim=-1) / size.clamp_min(1e-30), scale)
    return _better(W, top, scale, error, _storable(found.clamp_min(0)))[0]


def _better(W: Tensor, top: Tensor, held: Tensor, error: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return, row by row, the scale with the smaller error, and that error."""
    found = _error(W, scale, top)
    wins = found < error
    return torch.where(wins, scale, held), torch.where(wins, found, error)


def _error(W: Tensor, scale: Tensor, top: Tensor) -> Float[Tensor, "*rows"]:
    levels = _levels(W, scale, top) - top / 2
    return (W - levels * scale[..., None]).square().sum(dim=-1)


def _storable(scale: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    return scale.to(SCALE_DTYPE).to(scale)
