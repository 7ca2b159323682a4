"""Adapters as entropy-coded integers: one step in a row, and integers in as many bits as they are surprising.

A row of a matrix is read back as q_k s c_k, with one step s = 2^(e/2) of the row, a number c_k of each column, and
integers q_k that no bits are set apart for: what a row and a column of small numbers have is nearly always 0 and takes
next to nothing. How far an integer spreads is known from its row and column: its class (`globe.bank.entropy`) is the
sum of a number of the row and one of the column. The exponent and that number of a row are each what its expert has,
in a byte, and 0 .. 15 more of its own, which share a byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from globe.bank.entropy import CLASSES, decode, encode, states_of, tables
from globe.bank.rounding import LARGEST, SCALE_DTYPE, Rounded, StepGrid
from globe.errors import ArtefactError

_SPREADS = 16
_BELOW = 24
"""What the sum of a row's and a column's numbers is lowered by to be a class, so that neither has to be negative."""
_FARTHEST = 128
"""Largest exponent of an expert: sixty-four octaves."""
_SAMPLE = 1024
"""Rows that the spreads of columns are chosen on."""
_CHUNK = 1 << 22
"""Integers of which the code lengths are looked up at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """Adapters (n, p, k) of coded integers; the same interface as `globe.bank.packing.Packed`."""

    words: UInt8[Tensor, " bytes"]
    """streams of the n matrices, one after the other"""
    ends: Int32[Tensor, " n"]
    """bytes up to the end of each stream"""
    experts: UInt8[Tensor, "n 2"]
    """the exponent and the spread that are added to those of an expert's rows"""
    rows: UInt8[Tensor, "n p"]
    """16 times the exponent of the row's step, plus the spread of its integers"""
    spread: UInt8[Tensor, " k"]
    """of the columns' integers"""
    columns: Tensor
    """(k,) of bfloat16: what the columns were divided by before they were rounded"""

    @classmethod
    def of(cls, rounded: Rounded, columns: Tensor) -> Coded:
        """Code what was rounded; every row has classes that reach all of its integers."""
        grid = rounded.grid
        assert isinstance(grid, StepGrid)
        n, p, k = rounded.codes.shape
        integers = rounded.codes.cpu().numpy().reshape(n, p * k) - np.int16(LARGEST)
        spread, row, column = map(torch.from_numpy, _spreads(np.abs(integers).reshape(n, p, k)))
        least = grid.exponents.amin(dim=1)
        experts = torch.stack([least.cpu(), spread], dim=1)
        rows = row + 16 * (grid.exponents - least[:, None]).cpu()
        stream, ends = encode(integers, _classes(experts, rows, column))
        words, bounds = torch.from_numpy(stream), torch.from_numpy(ends.astype(np.int32))
        found = (words, bounds, experts, rows, column, columns.to(SCALE_DTYPE))
        return cls(*(one.to(rounded.codes.device) for one in found))

    def rounded(self) -> Rounded:
        """Return the integers and steps again. Raises ArtefactError for streams that none were coded into."""
        n, p, k = self.shape
        if not n:
            none = self.words.new_zeros(n, p, k, dtype=torch.int16)
            return Rounded(none, self._grid.scale, self._grid)
        classes = _classes(self.experts, self.rows, self.spread)
        try:
            found = decode(self.words.cpu().numpy(), self.ends.cpu().numpy().astype(np.int64), classes)
        except ValueError as error:
            raise ArtefactError(
                f"coded adapters can't be used: they have {error}; copy or export them again"
            ) from error
        codes = torch.from_numpy(found + np.int16(LARGEST)).view(n, p, k)
        return Rounded(codes.to(self.words.device), self._grid.scale, self._grid)

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the adapters: computed in float32, rounded once to `dtype`, a few matrices at a time."""
        out = torch.empty(*self.shape, dtype=dtype, device=self.words.device)
        n, p, k = self.shape
        size = max(1, _CHUNK // max(1, p * k))
        for start in range(0, n, size):
            part = slice(start, start + size)
            out[part] = self[part].rounded().values() * self.columns.float()
        return out

    def __getitem__(self, rows: Any) -> Coded:
        """Return some of the matrices."""
        bounds = [0, *self.ends.tolist()]
        chosen = torch.arange(len(bounds) - 1)[rows].flatten().tolist()
        words = torch.cat([self.words[bounds[at] : bounds[at + 1]] for at in chosen] or [self.words[:0]])
        lengths = torch.tensor([bounds[at + 1] - bounds[at] for at in chosen], dtype=torch.int32)
        ends = lengths.cumsum(0, dtype=torch.int32).to(self.ends.device)
        return replace(self, words=words, ends=ends, experts=self.experts[rows], rows=self.rows[rows])

    def sizes(self, columns: Float[Tensor, " k"]) -> tuple[Float[Tensor, "n p"], Float[Tensor, " k"]]:
        """Return what the classes say of the squares of integers, as a share of the row and one of the column, were the
        columns divided by `columns`."""
        row = torch.exp2(((self.rows & 15) + self.experts[:, 1:]) / 2 - 6 - _BELOW / 2)
        return row, torch.exp2(self.spread / 2) * (self.columns.float() / columns.float()).square()

    @property
    def _grid(self) -> StepGrid:
        return StepGrid(len(self.spread), (self.rows >> 4) + self.experts[:, :1])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows.shape, len(self.spread))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return what is written, by the names that follow the factor's own and a point."""
        names = ("words", "ends", "experts", "rows", "spread", "columns")
        return {name: getattr(self, name) for name in names}

    def layout(self) -> dict[str, Any]:
        """Return what the tensors mean, in plain values."""
        return {"coded": len(self.spread)}


def _classes(
    experts: UInt8[Tensor, "n 2"], rows: UInt8[Tensor, "n p"], spread: UInt8[Tensor, " k"]
) -> np.ndarray:
    """Return the class of every integer, (n, p k)."""
    row = ((rows & 15) + experts[:, 1:]).short()[..., None]
    classes = (row + spread - _BELOW).clamp(0, CLASSES - 1).to(torch.uint8)
    return classes.flatten(1).cpu().numpy()


def _spreads(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers of experts, rows and columns that code sizes (n, p, k) of integers in the fewest bits.

    Those of rows and columns are chosen in turn, the columns' on some of the rows; the expert's are as large as leaves
    the largest of its rows 15, since what is more than a row needs costs little.
    """
    n, p, k = sizes.shape
    flat = sizes.reshape(n * p, k)
    sample = flat[:: max(1, n * p // _SAMPLE)]
    column = np.full(k, _BELOW)
    for _ in range(3):
        row = _best(sample, column)
        column = _best(sample.T, row)
    row = np.concatenate([_best(part, column) for part in _parts(flat, k)]).reshape(n, p)
    expert = np.maximum(0, row.max(axis=1) - _SPREADS + 1)
    own = np.maximum(0, row - expert[:, None])
    return expert.astype(np.uint8), own.astype(np.uint8), column.astype(np.uint8)


def _parts(sizes: np.ndarray, k: int) -> list[np.ndarray]:
    step = max(1, _CHUNK // max(1, k))
    return [sizes[start : start + step] for start in range(0, len(sizes), step)]


def _best(sizes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the number of every row that codes its sizes in few bits, where the columns have `other`.

    It is the best of every fourth number, and then of the neighbours of that.
    """
    length = tables().length

    def cost(tried: np.ndarray) -> np.ndarray:
        return length[(other + tried[:, None] - _BELOW).clip(0, CLASSES - 1), sizes].sum(axis=1)

    coarse = np.arange(0, CLASSES + _BELOW, 4)
    best = coarse[np.argmin([cost(np.full(len(sizes), one)) for one in coarse], axis=0)]
    near = best + np.arange(-3, 4)[:, None]
    near = near.clip(0, CLASSES + _BELOW - 1)
    return near[np.argmin([cost(one) for one in near], axis=0), np.arange(len(sizes))]


def read_coded(tensors: Mapping[str, Tensor], layout: Mapping[str, Any], where: str) -> Coded:
    """Return coded adapters from tensors and a layout, both of which a file may have got wrong; streams are checked
    when they are decoded.

    Raises ArtefactError with one sentence that begins with `where` and names the first thing wrong.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise ArtefactError(f"{where} can't be used: it has {problem}; export the run again")

    k = layout.get("coded")
    whole = isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= 1 << 20
    require(whole, f"{k!r} columns")
    dtypes = dict.fromkeys(("words", "experts", "rows", "spread"), torch.uint8)
    dtypes |= {"ends": torch.int32, "columns": SCALE_DTYPE}
    require(set(tensors) == set(dtypes), f"other parts than {sorted(dtypes)}")
    for name, dtype in dtypes.items():
        require(tensors[name].dtype == dtype, f"{name} of {tensors[name].dtype} where {dtype} is due")
    words, ends, rows = tensors["words"], tensors["ends"], tensors["rows"]
    shapes = rows.dim() == 2 and rows.numel() > 0 and words.dim() == 1 and ends.shape == rows.shape[:1]
    shapes = shapes and tensors["spread"].shape == (k,) and tensors["columns"].shape == (k,)
    shapes = shapes and tensors["experts"].shape == (len(ends), 2)
    require(bool(shapes), "parts of shapes that do not fit")
    bounds = torch.cat([ends.new_zeros(1), ends]).long()
    least = 4 * states_of(rows.shape[1] * len(tensors["spread"]))
    good = bool((bounds.diff() >= least).all()) and int(bounds[-1]) == len(words)
    require(good, "streams that do not fit its bytes")
    require(bool(torch.isfinite(tensors["columns"]).all()), "columns that are NaN or infinite")
    spreads = torch.cat([tensors["spread"], tensors["experts"][:, 1]])
    require(bool((spreads < CLASSES + _BELOW).all()), "columns or experts of an unknown spread")
    require(bool((tensors["experts"][:, 0] <= _FARTHEST).all()), "steps that are too large")
    return Coded(**tensors)
