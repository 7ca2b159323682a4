"""Rounded factors as they are stored: integers packed bit by bit into bytes, scales beside them.

Where rows differ in their bits (`LevelGrid`) their bytes follow each other without gaps, in one stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from globe.bank.rotation import rotation
from globe.bank.rounding import MOST_BITS, SCALE_DTYPE, Grid, LevelGrid, Rounded, StepGrid, row_width
from globe.errors import ArtefactError

_CHUNK = 1 << 24
"""Bits that are spread out at once while integers are packed or unpacked."""
_MOST_COLUMNS = 1 << 20
"""More than any factor has; a file that claims more is refused before memory is asked for."""


def _runs(each: Sequence[int]) -> Iterator[tuple[int, slice, slice]]:
    """Yield the bits, columns, and place in the stream of every run of columns of equal bits."""
    column = at = 0
    for bits, run in groupby(each):
        count = len(list(run))
        yield bits, slice(column, column + count), slice(at, at + bits * count)
        column, at = column + count, at + bits * count


def pack(codes: UInt8[Tensor, "*rows k"], grid: Grid) -> UInt8[Tensor, "*rows bytes"]:
    """Return the integers of so many bits a column as one stream of bits a row, least significant bit first.

    A row begins with a new byte, and read as little-endian words of any length the stream is the same.
    """
    rows, width = codes.flatten(0, -2), row_width(grid.bits)
    out = torch.empty(rows.shape[0], width, dtype=torch.uint8, device=codes.device)
    place = _places(8, codes)
    size = max(1, _CHUNK // max(1, 8 * width))
    for start in range(0, rows.shape[0], size):
        part = rows[start : start + size]
        stream = part.new_zeros(part.shape[0], 8 * width)
        for bits, columns, where in _runs(grid.bits):
            shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
            stream[:, where] = ((part[:, columns, None] >> shifts) & 1).flatten(1)
        out[start : start + size] = (stream.view(len(part), width, 8) * place).sum(dim=2, dtype=torch.uint8)
    return out.reshape(*codes.shape[:-1], width)


def unpack(words: UInt8[Tensor, "*rows bytes"], grid: Grid) -> UInt8[Tensor, "*rows k"]:
    """Return the integers that `pack` was given."""
    rows, k = words.flatten(0, -2), len(grid.bits)
    out = torch.empty(rows.shape[0], k, dtype=torch.uint8, device=words.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    size = max(1, _CHUNK // max(1, 8 * rows.shape[1]))
    for start in range(0, rows.shape[0], size):
        stream = ((rows[start : start + size, :, None] >> shifts) & 1).flatten(1)
        for bits, columns, where in _runs(grid.bits):
            spread = stream[:, where].reshape(len(stream), columns.stop - columns.start, bits)
            out[start : start + size, columns] = (spread * _places(bits, words)).sum(2, dtype=torch.uint8)
    return out.view(*words.shape[:-1], k)


def _pack_levels(codes: UInt8[Tensor, "*rows k"], grid: LevelGrid) -> UInt8[Tensor, " bytes"]:
    """Return the integers of rows of different bits, one row after the other."""
    rows, levels = codes.flatten(0, -2), grid.levels.flatten().long()
    starts, total = _starts(grid)
    out = torch.empty(total, dtype=torch.uint8, device=codes.device)
    for level, table in enumerate(grid.tables):
        chosen = (levels == level).nonzero()[:, 0]
        if len(chosen) and (width := row_width(table)):
            place = starts[chosen, None] + torch.arange(width, device=codes.device)
            out[place] = pack(rows[chosen], Grid(table, grid.group))
    return out


def _unpack_levels(words: UInt8[Tensor, " bytes"], grid: LevelGrid) -> UInt8[Tensor, "*rows k"]:
    """Return the integers that `_pack_levels` was given."""
    levels, (starts, _) = grid.levels.flatten().long(), _starts(grid)
    out = torch.zeros(len(levels), grid.group, dtype=torch.uint8, device=words.device)
    for level, table in enumerate(grid.tables):
        chosen = (levels == level).nonzero()[:, 0]
        if len(chosen) and (width := row_width(table)):
            place = starts[chosen, None] + torch.arange(width, device=words.device)
            out[chosen] = unpack(words[place], Grid(table, grid.group))
    return out.view(*grid.levels.shape, grid.group)


def _starts(grid: LevelGrid) -> tuple[Int[Tensor, " rows"], int]:
    """Return where each row begins in the stream, and the length of the stream."""
    widths = torch.tensor([row_width(table) for table in grid.tables], device=grid.levels.device)
    ends = widths[grid.levels.flatten().long()].cumsum(dim=0)
    return ends - widths[grid.levels.flatten().long()], int(ends[-1]) if len(ends) else 0


def _places(bits: int, like: Tensor) -> UInt8[Tensor, " bits"]:
    return torch.tensor([1 << at for at in range(bits)], dtype=torch.uint8, device=like.device)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A factor (*rows, k) of few bits: (q - z) s, times a number for each column where there are such."""

    words: Tensor
    """(*rows, bytes) of uint8, or one stream of all rows where they differ in their bits"""
    scale: Tensor
    """(*rows, groups) of bfloat16"""
    grid: Grid | LevelGrid
    columns: Tensor | None = None
    """(k,) of bfloat16: what the columns were divided by before they were rounded"""
    turned: int | None = None
    """seed of the rotation R that the rows of each matrix were multiplied by from the left before they were rounded"""

    @classmethod
    def of(cls, rounded: Rounded, columns: Tensor | None = None, turned: int | None = None) -> Packed:
        """Pack what was rounded; `columns` are rounded to bfloat16."""
        scales, grid = None if columns is None else columns.to(SCALE_DTYPE), rounded.grid
        assert not isinstance(grid, StepGrid)
        if isinstance(grid, LevelGrid):
            return cls(_pack_levels(rounded.codes, grid), rounded.scale, grid, scales, turned)
        return cls(pack(rounded.codes, grid), rounded.scale, grid, scales, turned)

    @classmethod
    def joined(cls, parts: Sequence[Packed]) -> Packed:
        """Return the parts of one factor below each other; they have one grid, and columns and rotation in common."""
        words, scale = (torch.cat([getattr(one, name) for one in parts]) for name in ("words", "scale"))
        grid, grids = parts[0].grid, [one.grid for one in parts if isinstance(one.grid, LevelGrid)]
        if isinstance(grid, LevelGrid):
            grid = LevelGrid(grid.tables, torch.cat([one.levels for one in grids]))
        return replace(parts[0], words=words, scale=scale, grid=grid)

    def rounded(self) -> Rounded:
        """Return the integers and scales again."""
        if isinstance(self.grid, LevelGrid):
            return Rounded(_unpack_levels(self.words, self.grid), self.scale, self.grid)
        return Rounded(unpack(self.words, self.grid), self.scale, self.grid)

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the factor (*rows, k): computed in float32, rounded once to `dtype`, a few rows at a time."""
        out = torch.empty(*self.shape, dtype=dtype, device=self.words.device)
        back = None
        if self.turned is not None:
            back = rotation(self.shape[-2], self.turned).T.to(self.words.device)
        for at in range(self.scale.shape[0]):
            row = self[at].rounded().values()
            row = row if self.columns is None else row * self.columns.float()
            out[at] = row if back is None else back @ row
        return out

    def __getitem__(self, rows: Any) -> Packed:
        """Return some of the first axis."""
        words = self.words
        if isinstance(self.grid, LevelGrid):
            starts, total = _starts(self.grid)
            bounds = [*starts[:: self.grid.levels[0].numel()].tolist(), total]
            chosen = torch.arange(len(bounds) - 1)[rows].flatten().tolist()
            words = torch.cat([words[bounds[at] : bounds[at + 1]] for at in chosen] or [words[:0]])
        else:
            words = words[rows]
        return replace(self, words=words, scale=self.scale[rows], grid=self.grid.of_rows(rows))

    @property
    def shape(self) -> tuple[int, ...]:
        width = self.grid.group if isinstance(self.grid, LevelGrid) else len(self.grid.bits)
        return (*self.scale.shape[:-1], width)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return what is written, by the names that follow the factor's own and a point."""
        levels = self.grid.levels if isinstance(self.grid, LevelGrid) else None
        found = {"words": self.words, "scale": self.scale, "columns": self.columns, "levels": levels}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def layout(self) -> dict[str, Any]:
        """Return what the tensors mean, in plain values: runs of columns of equal bits, and columns of a group.

        Where rows differ in their bits there are runs for each level, and no group, since all columns share a scale.
        """
        if isinstance(self.grid, LevelGrid):
            return {"levels": [_described(table) for table in self.grid.tables], "turned": self.turned}
        return {"bits": _described(self.grid.bits), "group": self.grid.group, "turned": self.turned}


def _described(each: Sequence[int]) -> list[list[int]]:
    return [[bits, columns.stop - columns.start] for bits, columns, _ in _runs(each)]


def read_packed(tensors: Mapping[str, Tensor], layout: Any, where: str) -> Packed:
    """Return a packed factor from its tensors and its layout, both of which a file may have got wrong.

    Raises ArtefactError with one sentence that begins with `where` and names the first thing wrong.
    """
    _require("words" in tensors and "scale" in tensors, where, "no words, or no scales")
    words, scale = tensors["words"], tensors["scale"]
    grid = grid_of(layout, where, tensors.get("levels"))
    levelled = isinstance(grid, LevelGrid)
    _require(words.dim() == 1 if levelled else words.dim() >= 2 and words.numel() > 0, where, "no rows")
    rows = tuple(grid.levels.shape if isinstance(grid, LevelGrid) else words.shape[:-1])
    columns = grid.group if isinstance(grid, LevelGrid) else len(grid.bits)
    width = (_starts(grid)[1],) if isinstance(grid, LevelGrid) else (*rows, row_width(grid.bits))
    expected = {
        "words": (width, torch.uint8),
        "scale": ((*rows, grid.group_count), SCALE_DTYPE),
        "columns": ((columns,), SCALE_DTYPE),
    }
    if levelled:
        expected["levels"] = (rows, torch.uint8)
    for name, tensor in tensors.items():
        _require(name in expected, where, f"an unknown part {name!r}")
        shape, dtype = expected[name]
        _require(
            tuple(tensor.shape) == shape and tensor.dtype == dtype,
            where,
            f"{name} of {tensor.dtype} {tuple(tensor.shape)} where {dtype} {shape} is due",
        )
        finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
        _require(finite, where, f"{name} that are NaN or infinite")
    _require(bool((scale >= 0).all()), where, "negative scales")
    turned = layout.get("turned")
    seed = turned is None or _whole(turned, 0, (1 << 63) - 1)
    _require(seed and (turned is None or len(rows) == 2), where, f"rows turned by {turned!r}")
    return Packed(words, scale, grid, tensors.get("columns"), turned)


def grid_of(layout: Any, where: str, levels: Tensor | None = None) -> Grid | LevelGrid:
    """Return the grid that `Packed.layout` describes. Raises ArtefactError where it describes none.

    `levels` are those of the rows, where the layout has several. Without them the grid is that of no rows.
    """
    _require(isinstance(layout, Mapping), where, "no layout")
    if "levels" not in layout:
        _require(levels is None, where, "levels of rows that do not differ")
        group = layout.get("group")
        _require(_whole(group, 1, _MOST_COLUMNS), where, f"a group of {group!r}")
        return Grid(_table(layout.get("bits"), where), group)
    described = layout["levels"]
    several = isinstance(described, list | tuple) and 0 < len(described) <= 256
    _require(several, where, "no list of levels")
    tables = tuple(_table(runs, where) for runs in described)
    _require(len({len(table) for table in tables}) == 1, where, "levels of different columns")
    if levels is None:
        levels = torch.empty(0, 0, dtype=torch.uint8, device="cpu")
    good = levels.dtype == torch.uint8 and levels.dim() == 2 and bool((levels < len(tables)).all())
    _require(good, where, "levels of rows that are not described")
    return LevelGrid(tables, levels)


def _table(runs: Any, where: str) -> tuple[int, ...]:
    """Return the bits of every column from its runs."""
    _require(isinstance(runs, list | tuple) and len(runs) > 0, where, "no list of bits")
    columns = 0
    for run in runs:
        pair = isinstance(run, list | tuple) and len(run) == 2
        good = pair and _whole(run[0], 0, MOST_BITS) and _whole(run[1], 1, _MOST_COLUMNS)
        _require(
            good, where, f"a run of columns {run!r} that is no number of bits, 0 to {MOST_BITS}, and a length"
        )
        columns += run[1]
    _require(columns <= _MOST_COLUMNS, where, f"{columns} columns")
    return tuple(bits for bits, count in runs for _ in range(count))


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _require(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise ArtefactError(f"{where} can't be used: it has {problem}; export the run again")
