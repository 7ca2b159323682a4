"""Adapters as entropy-coded integers: one step in a row, and integers in as many bits as they are surprising.

A row of a matrix is read back as q_k s c_k, with one step s = 2^(e/2) of the row, e = 0 .. 15, a number c_k of each
column, and integers q_k that no bits are set apart for: what a row and a column of small numbers have is nearly always
0 and takes next to nothing. How far an integer spreads is known from its row and column: its class
(`globe.bank.entropy`) is the sum of a number 0 .. 15 of the row and one of the column. Both numbers of a row share a
byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from globe.bank.entropy import CLASSES, ZERO, decode, encode, states_of, tables
from globe.bank.rounding import SCALE_DTYPE, Rounded, StepGrid
from globe.errors import ArtefactError

_SPREADS = 16
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
    rows: UInt8[Tensor, "n p"]
    """16 times the exponent of the row's step, plus the spread of its integers"""
    spread: UInt8[Tensor, " k"]
    """of the columns' integers"""
    columns: Tensor
    """(k,) of bfloat16: what the columns were divided by before they were rounded"""

    @classmethod
    def of(cls, rounded: Rounded, columns: Tensor) -> Coded:
        """Code what was rounded. Integers beyond the reach of their class, which are very rare, become its largest."""
        grid = rounded.grid
        assert isinstance(grid, StepGrid)
        n, p, k = rounded.codes.shape
        codes = rounded.codes.cpu().reshape(n * p, k).numpy()
        row, column = _spreads(np.abs(codes.astype(np.int16) - ZERO).astype(np.uint8))
        classes = _classes(row, column)
        reach = tables().reach[classes]
        codes = np.clip(codes, ZERO - reach, ZERO + reach).astype(np.uint8)
        stream, ends = encode(codes.reshape(n, p * k), classes.reshape(n, p * k))
        rows = torch.from_numpy(row.astype(np.uint8)).view(n, p) + 16 * grid.exponents.cpu()
        own = (torch.from_numpy(stream), torch.from_numpy(ends.astype(np.int32)), rows)
        device = rounded.codes.device
        found = (*own, torch.from_numpy(column.astype(np.uint8)), columns.to(SCALE_DTYPE))
        return cls(*(one.to(device) for one in found))

    def rounded(self) -> Rounded:
        """Return the integers and steps again. Raises ArtefactError for streams that none were coded into."""
        n, p, k = self.shape
        if not n:
            return Rounded(self.words.new_zeros(n, p, k), self._grid.scale, self._grid)
        row = (self.rows & 15).cpu().flatten().numpy().astype(np.int64)
        classes = _classes(row, self.spread.cpu().numpy().astype(np.int64)).reshape(n, p * k)
        try:
            codes = decode(self.words.cpu().numpy(), self.ends.cpu().numpy().astype(np.int64), classes)
        except ValueError as error:
            raise ArtefactError(
                f"coded adapters can't be used: they have {error}; copy or export them again"
            ) from error
        whole = torch.from_numpy(np.ascontiguousarray(codes)).view(n, p, k).to(self.words.device)
        return Rounded(whole, self._grid.scale, self._grid)

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
        return replace(self, words=words, ends=ends, rows=self.rows[rows])

    @property
    def _grid(self) -> StepGrid:
        return StepGrid(len(self.spread), self.rows >> 4)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows.shape, len(self.spread))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return what is written, by the names that follow the factor's own and a point."""
        names = ("words", "ends", "rows", "spread", "columns")
        return {name: getattr(self, name) for name in names}

    def layout(self) -> dict[str, Any]:
        """Return what the tensors mean, in plain values."""
        return {"coded": len(self.spread)}


def _classes(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return the class of every integer."""
    return np.minimum(row[:, None] + column, CLASSES - 1).astype(np.uint8)


def _spreads(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of rows and columns that code these sizes (rows, k) of integers in the fewest bits.

    They are chosen in turn, the columns' on some of the rows.
    """
    length = tables().length
    count, k = sizes.shape
    sample = sizes[:: max(1, count // _SAMPLE)]
    row, column = np.full(len(sample), _SPREADS // 2), np.zeros(k, dtype=np.int64)
    for _ in range(3):
        tried = np.arange(CLASSES)
        cost = np.stack(
            [length[np.minimum(row + one, CLASSES - 1)[:, None], sample].sum(axis=0) for one in tried]
        )
        column = cost.argmin(axis=0)
        row = _best_rows(sample, column)
    every = np.concatenate([_best_rows(part, column) for part in _parts(sizes, k)])
    return every, column


def _parts(sizes: np.ndarray, k: int) -> list[np.ndarray]:
    step = max(1, _CHUNK // max(1, k))
    return [sizes[start : start + step] for start in range(0, len(sizes), step)]


def _best_rows(sizes: np.ndarray, column: np.ndarray) -> np.ndarray:
    length = tables().length
    cost = [length[np.minimum(column + one, CLASSES - 1), sizes].sum(axis=1) for one in range(_SPREADS)]
    return np.stack(cost).argmin(axis=0)


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
    dtypes = {"words": torch.uint8, "ends": torch.int32, "rows": torch.uint8, "spread": torch.uint8}
    dtypes["columns"] = SCALE_DTYPE
    require(set(tensors) == set(dtypes), f"other parts than {sorted(dtypes)}")
    for name, dtype in dtypes.items():
        require(tensors[name].dtype == dtype, f"{name} of {tensors[name].dtype} where {dtype} is due")
    words, ends, rows = tensors["words"], tensors["ends"], tensors["rows"]
    shapes = rows.dim() == 2 and rows.numel() > 0 and words.dim() == 1 and ends.shape == rows.shape[:1]
    shapes = shapes and tensors["spread"].shape == (k,) and tensors["columns"].shape == (k,)
    require(bool(shapes), "parts of shapes that do not fit")
    bounds = torch.cat([ends.new_zeros(1), ends]).long()
    least = 4 * states_of(rows.shape[1] * len(tensors["spread"]))
    good = bool((bounds.diff() >= least).all()) and int(bounds[-1]) == len(words)
    require(good, "streams that do not fit its bytes")
    require(bool(torch.isfinite(tensors["columns"]).all()), "columns that are NaN or infinite")
    require(bool((tensors["spread"] < CLASSES).all()), "columns of an unknown spread")
    return Coded(words, ends, rows, tensors["spread"], tensors["columns"])
