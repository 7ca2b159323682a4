"""Rounded factors as they are stored: integers packed bit by bit into bytes, scales beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from globe.bank.rotation import rotation
from globe.bank.rounding import MOST_BITS, SCALE_DTYPE, Grid, Rounded
from globe.errors import ArtefactError

_CHUNK = 1 << 24
"""Bits that are spread out at once while integers are packed or unpacked."""
_MOST_COLUMNS = 1 << 20
"""More than any factor has; a file that claims more is refused before memory is asked for."""


def packed_bytes(grid: Grid) -> int:
    """Bytes of one packed row."""
    return -(-sum(grid.bits) // 8)


def _runs(grid: Grid) -> Iterator[tuple[int, slice, slice]]:
    """Bits, columns, and place in the stream of every run of columns of equal bits."""
    column = at = 0
    for bits, run in groupby(grid.bits):
        count = len(list(run))
        yield bits, slice(column, column + count), slice(at, at + bits * count)
        column, at = column + count, at + bits * count


def pack(codes: UInt8[Tensor, "*rows k"], grid: Grid) -> UInt8[Tensor, "*rows bytes"]:
    """Integers of so many bits a column as one stream of bits a row, least significant bit first.

    A row begins with a new byte, and read as little-endian words of any length the stream is the same.
    """
    rows, width = codes.flatten(0, -2), packed_bytes(grid)
    out = torch.empty(rows.shape[0], width, dtype=torch.uint8, device=codes.device)
    place = _places(8, codes)
    size = max(1, _CHUNK // max(1, 8 * width))
    for start in range(0, rows.shape[0], size):
        part = rows[start : start + size]
        stream = part.new_zeros(part.shape[0], 8 * width)
        for bits, columns, where in _runs(grid):
            shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
            stream[:, where] = ((part[:, columns, None] >> shifts) & 1).flatten(1)
        out[start : start + size] = (stream.view(len(part), width, 8) * place).sum(dim=2, dtype=torch.uint8)
    return out.reshape(*codes.shape[:-1], width)


def unpack(words: UInt8[Tensor, "*rows bytes"], grid: Grid) -> UInt8[Tensor, "*rows k"]:
    """The integers that `pack` was given."""
    rows, k = words.flatten(0, -2), len(grid.bits)
    out = torch.empty(rows.shape[0], k, dtype=torch.uint8, device=words.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    size = max(1, _CHUNK // max(1, 8 * rows.shape[1]))
    for start in range(0, rows.shape[0], size):
        stream = ((rows[start : start + size, :, None] >> shifts) & 1).flatten(1)
        for bits, columns, where in _runs(grid):
            spread = stream[:, where].reshape(len(stream), columns.stop - columns.start, bits)
            out[start : start + size, columns] = (spread * _places(bits, words)).sum(2, dtype=torch.uint8)
    return out.view(*words.shape[:-1], k)


def _places(bits: int, like: Tensor) -> UInt8[Tensor, " bits"]:
    return torch.tensor([1 << at for at in range(bits)], dtype=torch.uint8, device=like.device)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A factor (*rows, k) of few bits: (q - z) s, times a number for each column where there are such."""

    words: Tensor
    """(*rows, bytes) of uint8"""
    scale: Tensor
    """(*rows, groups) of bfloat16"""
    grid: Grid
    columns: Tensor | None = None
    """(k,) of bfloat16: what the columns were divided by before they were rounded"""
    turned: int | None = None
    """seed of the rotation R that the rows of each matrix were multiplied by from the left before they were rounded"""

    @classmethod
    def of(cls, rounded: Rounded, columns: Tensor | None = None, turned: int | None = None) -> Packed:
        """Pack what was rounded; `columns` are rounded to bfloat16."""
        scales = None if columns is None else columns.to(SCALE_DTYPE)
        return cls(pack(rounded.codes, rounded.grid), rounded.scale, rounded.grid, scales, turned)

    @classmethod
    def joined(cls, parts: Sequence[Packed]) -> Packed:
        """Parts of one factor below each other; they have one grid, and columns and rotation in common."""
        words, scale = (torch.cat([getattr(one, name) for one in parts]) for name in ("words", "scale"))
        return replace(parts[0], words=words, scale=scale)

    def rounded(self) -> Rounded:
        """Return the integers and scales again."""
        return Rounded(unpack(self.words, self.grid), self.scale, self.grid)

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The factor (*rows, k): computed in float32, rounded once to `dtype`, a few rows at a time."""
        out = torch.empty(*self.shape, dtype=dtype, device=self.words.device)
        back = None
        if self.turned is not None:
            back = rotation(self.shape[-2], self.turned).T.to(self.words.device)
        for at in range(self.words.shape[0]):
            row = self[at].rounded().values()
            row = row if self.columns is None else row * self.columns.float()
            out[at] = row if back is None else back @ row
        return out

    def __getitem__(self, rows: Any) -> Packed:
        """Return some of the first axis."""
        return replace(self, words=self.words[rows], scale=self.scale[rows])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-1], len(self.grid.bits))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What is written, by the names that follow the factor's own and a point."""
        found = {"words": self.words, "scale": self.scale, "columns": self.columns}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def layout(self) -> dict[str, Any]:
        """What the tensors mean, in plain values: runs of columns of equal bits, and columns of a group."""
        runs = [[bits, columns.stop - columns.start] for bits, columns, _ in _runs(self.grid)]
        return {"bits": runs, "group": self.grid.group, "turned": self.turned}


def read_packed(tensors: Mapping[str, Tensor], layout: Any, where: str) -> Packed:
    """A packed factor from its tensors and its layout, both of which a file may have got wrong.

    Raises ArtefactError with one sentence that begins with `where` and names the first thing wrong.
    """
    _require("words" in tensors and "scale" in tensors, where, "no words, or no scales")
    words, scale = tensors["words"], tensors["scale"]
    _require(words.dim() >= 2 and words.numel() > 0, where, "no rows")
    grid = grid_of(layout, where)
    rows, columns = tuple(words.shape[:-1]), len(grid.bits)
    expected = {
        "words": ((*rows, packed_bytes(grid)), torch.uint8),
        "scale": ((*rows, grid.group_count), SCALE_DTYPE),
        "columns": ((columns,), SCALE_DTYPE),
    }
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
    _require(seed and (turned is None or words.dim() == 3), where, f"rows turned by {turned!r}")
    return Packed(words, scale, grid, tensors.get("columns"), turned)


def grid_of(layout: Any, where: str) -> Grid:
    """The grid that `Packed.layout` describes. Raises ArtefactError where it describes none."""
    _require(isinstance(layout, Mapping), where, "no layout")
    group, runs = layout.get("group"), layout.get("bits")
    _require(_whole(group, 1, _MOST_COLUMNS), where, f"a group of {group!r}")
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
    return Grid(tuple(bits for bits, count in runs for _ in range(count)), group)


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _require(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise ArtefactError(f"{where} can't be used: it has {problem}; export the run again")
