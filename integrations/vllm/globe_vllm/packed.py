"""Factors of few bits, as they are stored, made into numbers: the reading half of GloBE's `bank/packing.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PARTS = ("words", "scale", "zero", "columns")
"""What every packed factor can have; one whose rows differ in their bits has the levels of its rows too."""


class Packed:
    """The tensors of one packed factor (*rows, k), collected until they are all there."""

    def __init__(self, layout: Mapping[str, Any]) -> None:
        self.layout = layout
        self.wanted = set(PARTS) - set(layout["absent"]) | ({"levels"} if "levels" in layout else set())
        self.parts: dict[str, Tensor] = {}

    def take(self, name: str, value: Tensor) -> Tensor | None:
        """Keep one tensor; the factor in float32 once it was the last. Raises ValueError for one of another name."""
        if name not in self.wanted:
            raise ValueError(
                f"globe: the checkpoint holds {name!r} of a packed factor that has none: patch again"
            )
        self.parts[name] = value
        if set(self.parts) != self.wanted:
            return None
        found = values(self.parts, self.layout)
        self.parts = {}
        return found


def values(parts: Mapping[str, Tensor], layout: Mapping[str, Any]) -> Tensor:
    """(q - z) s, times a number a column where there are such, rotated back where the rows were rotated."""
    if "levels" in layout:
        out = leveled(parts["words"], parts["levels"], [spread(runs) for runs in layout["levels"]])
        out = out * parts["scale"].float()
    else:
        bits = spread(layout["bits"])
        codes = unpack(parts["words"], bits).float()
        group = torch.arange(len(bits)) // layout["group"]
        zero = parts.get("zero")
        offsets = middle(bits) if zero is None else zero.float()[..., group]
        out = (codes - offsets) * parts["scale"].float()[..., group]
    if "columns" in parts:
        out = out * parts["columns"].float()
    if layout.get("turned") is not None:
        out = rotation(out.shape[-2], layout["turned"]).T @ out
    return out


def spread(runs: Sequence[Sequence[int]]) -> list[int]:
    """Bits of each column, from runs of columns of equal bits."""
    return [run[0] for run in runs for _ in range(run[1])]


def middle(bits: list[int]) -> Tensor:
    """The offsets of a symmetric grid."""
    return torch.tensor([(2**b - 1) / 2 for b in bits])


def leveled(words: Tensor, levels: Tensor, tables: list[list[int]]) -> Tensor:
    """Integers less their offsets of rows that differ in their bits, whose bytes follow each other in one stream."""
    flat = levels.flatten().long()
    widths = torch.tensor([-(-sum(bits) // 8) for bits in tables])[flat]
    starts = widths.cumsum(0) - widths
    out = torch.zeros(len(flat), len(tables[0]))
    for level, bits in enumerate(tables):
        chosen = (flat == level).nonzero()[:, 0]
        place = starts[chosen, None] + torch.arange(-(-sum(bits) // 8))
        out[chosen] = unpack(words[place], bits).float() - middle(bits)
    return out.view(*levels.shape, -1)


def unpack(words: Tensor, bits: list[int]) -> Tensor:
    """Integers of so many bits a column from a stream of bits a row, least significant bit first."""
    shifts = torch.arange(8, dtype=torch.uint8)
    stream = ((words[..., None] >> shifts) & 1).flatten(-2)
    out = torch.empty(*words.shape[:-1], len(bits), dtype=torch.uint8)
    at = 0
    for column, count in enumerate(bits):
        places = torch.tensor([1 << one for one in range(count)], dtype=torch.uint8)
        out[..., column] = (stream[..., at : at + count] * places).sum(-1, dtype=torch.uint8)
        at += count
    return out


def rotation(size: int, seed: int) -> Tensor:
    """The random orthogonal matrix of GloBE's `bank/rotation.py`, the same for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    block = size & -size
    once = block == size and size.bit_length() % 2 == 1
    if block == size and not once:
        block //= 2
    signs = torch.ones(1, 1)
    while len(signs) < block:
        signs = torch.cat([torch.cat([signs, signs], dim=1), torch.cat([signs, -signs], dim=1)])
    signs = torch.block_diag(*[signs] * (size // block))

    def draw() -> Tensor:
        return signs * (2.0 * torch.randint(2, (size,), generator=generator) - 1.0)

    if once:
        return draw() / size**0.5
    order = torch.randperm(size, generator=generator)
    return (draw()[:, order] @ draw()) / block
