"""Rounded factors as they are stored: integers packed bit by bit into bytes, scales beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from globe.bank.rounding import MOST_BITS, SCALE_DTYPE, Rounded, count_bits, groups_of
from globe.errors import ArtefactError

_CHUNK = 1 << 24
"""Bits that are spread out at once while integers are packed or unpacked."""


def packed_bytes(bits: Sequence[int], group: int, k: int) -> int:
    """Bytes of one packed row of k integers."""
    return -(-_row_bits(bits, group, k) // 8)


def _row_bits(bits: Sequence[int], group: int, k: int) -> int:
    return sum(b * (part.stop - part.start) for b, part in zip(bits, groups_of(k, group), strict=True))


def pack(codes: UInt8[Tensor, "*rows k"], bits: Sequence[int], group: int) -> UInt8[Tensor, "*rows bytes"]:
    """Integers of bits[g] bits in group g as one stream of bits a row, least significant bit first.

    A row begins with a new byte, and read as little-endian words of any length the stream is the same.
    """
    k, rows = codes.shape[-1], codes.reshape(-1, codes.shape[-1])
    width = packed_bytes(bits, group, k)
    out = torch.empty(rows.shape[0], width, dtype=torch.uint8, device=codes.device)
    place = torch.tensor([1 << at for at in range(8)], dtype=torch.uint8, device=codes.device)
    size = max(1, _CHUNK // max(1, 8 * width))
    for start in range(0, rows.shape[0], size):
        part = rows[start : start + size]
        stream = part.new_zeros(part.shape[0], 8 * width)
        at = 0
        for b, columns in zip(bits, groups_of(k, group), strict=True):
            shifts = torch.arange(b, dtype=torch.uint8, device=codes.device)
            spread = (part[:, columns, None] >> shifts) & 1
            stream[:, at : at + spread[0].numel()] = spread.flatten(1)
            at += spread[0].numel()
        out[start : start + size] = (stream.view(-1, width, 8) * place).sum(dim=2, dtype=torch.uint8)
    return out.view(*codes.shape[:-1], width)


def unpack(
    words: UInt8[Tensor, "*rows bytes"], bits: Sequence[int], group: int, k: int
) -> UInt8[Tensor, "*rows k"]:
    """The integers that `pack` was given."""
    rows = words.reshape(-1, words.shape[-1])
    out = torch.empty(rows.shape[0], k, dtype=torch.uint8, device=words.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    size = max(1, _CHUNK // max(1, 8 * rows.shape[1]))
    for start in range(0, rows.shape[0], size):
        stream = ((rows[start : start + size, :, None] >> shifts) & 1).flatten(1)
        at = 0
        for b, columns in zip(bits, groups_of(k, group), strict=True):
            count = columns.stop - columns.start
            place = torch.tensor([1 << one for one in range(b)], dtype=torch.uint8, device=words.device)
            spread = stream[:, at : at + b * count].reshape(-1, count, b)
            out[start : start + size, columns] = (spread * place).sum(dim=2, dtype=torch.uint8)
            at += b * count
    return out.view(*words.shape[:-1], k)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A factor (*rows, k) of few bits: (q - z) s, times a number for each column where there are such."""

    words: Tensor
    """(*rows, bytes) of uint8"""
    scale: Tensor
    """(*rows, groups) of bfloat16"""
    bits: tuple[int, ...]
    """of each group of columns"""
    group: int
    width: int
    """k, the columns"""
    zero: Tensor | None = None
    """(*rows, groups) of uint8; None for a symmetric grid"""
    columns: Tensor | None = None
    """(k,) of bfloat16: what the columns were divided by before they were rounded"""

    @classmethod
    def of(cls, rounded: Rounded, columns: Tensor | None = None) -> Packed:
        """Pack what was rounded; `columns` are rounded to bfloat16."""
        return cls(
            pack(rounded.codes, rounded.bits, rounded.group),
            rounded.scale,
            rounded.bits,
            rounded.group,
            rounded.codes.shape[-1],
            rounded.zero,
            None if columns is None else columns.to(SCALE_DTYPE),
        )

    def rounded(self) -> Rounded:
        """Integers, scales and offsets again."""
        codes = unpack(self.words, self.bits, self.group, self.width)
        return Rounded(codes, self.scale, self.zero, self.bits, self.group)

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The factor (*rows, k): computed in float32, rounded once to `dtype`, a few rows at a time."""
        out = torch.empty(*self.shape, dtype=dtype, device=self.words.device)
        for at in range(self.words.shape[0]):
            row = self[at].rounded().values()
            out[at] = row if self.columns is None else row * self.columns.float()
        return out

    def __getitem__(self, rows: Any) -> Packed:
        """Some of the first axis."""
        zero = None if self.zero is None else self.zero[rows]
        return Packed(
            self.words[rows], self.scale[rows], self.bits, self.group, self.width, zero, self.columns
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-1], self.width)

    @property
    def nbits(self) -> int:
        """Bits it takes, without those that fill up the last byte of a row; offsets count as integers."""
        rows = self.words[..., 0].numel()
        own = count_bits(rows, self.width, self.bits, self.group, symmetric=self.zero is None)
        return own + (0 if self.columns is None else 16 * self.width)

    def tensors(self) -> dict[str, Tensor]:
        """What is written, by the names that follow the factor's own and a point."""
        found = {"words": self.words, "scale": self.scale, "zero": self.zero, "columns": self.columns}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def layout(self) -> dict[str, Any]:
        """What the tensors mean, in plain values."""
        return {"bits": list(self.bits), "group": self.group, "width": self.width}


def read_packed(tensors: Mapping[str, Tensor], layout: Any, where: str) -> Packed:
    """A packed factor from its tensors and its layout, both of which a file may have got wrong.

    Raises ArtefactError with one sentence that begins with `where` and names the first thing wrong.
    """
    width, group, bits = _checked_layout(layout, where)
    unknown = sorted(set(tensors) - {"words", "scale", "zero", "columns"})
    _require(not unknown, where, f"unknown parts {unknown}")
    _require("words" in tensors and "scale" in tensors, where, "no words, or no scales")
    words, scale = tensors["words"], tensors["scale"]
    bytes_, rows = packed_bytes(bits, group, width), tuple(words.shape[:-1])
    expected = {
        "words": ((*rows, bytes_), torch.uint8),
        "scale": ((*rows, len(bits)), SCALE_DTYPE),
        "zero": ((*rows, len(bits)), torch.uint8),
        "columns": ((width,), SCALE_DTYPE),
    }
    for name, tensor in tensors.items():
        shape, dtype = expected[name]
        _require(
            tuple(tensor.shape) == shape and tensor.dtype == dtype,
            where,
            f"{name} of {tensor.dtype} {tuple(tensor.shape)} where {dtype} {shape} is due",
        )
        finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
        _require(finite, where, f"{name} that are NaN or infinite")
    _require(words.dim() >= 2 and words.numel() > 0, where, "no rows")
    _require(bool((scale >= 0).all()), where, "negative scales")
    zero = tensors.get("zero")
    if zero is not None:
        most = torch.tensor([2**b - 1 for b in bits], device=zero.device)
        _require(bool((zero <= most).all()), where, "offsets beyond the largest integer")
    return Packed(words, scale, bits, group, width, zero, tensors.get("columns"))


def _checked_layout(layout: Any, where: str) -> tuple[int, int, tuple[int, ...]]:
    _require(isinstance(layout, Mapping), where, "no layout")
    width, group, bits = layout.get("width"), layout.get("group"), layout.get("bits")
    for name, value in (("width", width), ("group", group)):
        whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31
        _require(whole, where, f"a {name} of {value!r}")
    _require(isinstance(bits, list | tuple), where, "no list of bits")
    _require(len(bits) == -(-width // group), where, f"{len(bits)} numbers of bits for its groups")
    good = all(isinstance(b, int) and not isinstance(b, bool) and 1 <= b <= MOST_BITS for b in bits)
    _require(good, where, f"groups of other than 1 to {MOST_BITS} bits")
    return width, group, tuple(bits)


def _require(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise ArtefactError(f"{where} can't be used: it has {problem}; export the run again")
