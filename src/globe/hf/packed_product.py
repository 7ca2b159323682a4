"""Adapters that stay integers in memory and are multiplied as such, by PyTorch's own kernels for processors.

A packed row of columns of b_j bits stands for (q_j - (2^b_j - 1) / 2) s c_j. Twice what is in brackets is an integer
t_j, of at most 127 for up to 7 bits, and zero for a column without bits; (t, s / 2) is what PyTorch's `int8pack` kernel
multiplies, one byte a number. Where no column has more than 4 bits, q_j + 8 - 2^b_j / 2 is the nibble and s / 2 the
offset of its `int4pack` kernel, half a byte. Both are fast in bfloat16 alone; c_j multiplies the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, library, nn

from globe.bank.packing import Packed
from globe.bank.rounding import Grid
from globe.hf.products import spans_of, spread

_ROWS, _COLUMNS = 16, 64
"""What rows and columns are padded to: the kernels read whole blocks."""


class PackedMatrices(nn.Module):
    """Matrices (h, p, r) of few bits, multiplied as integers."""

    def __init__(self, packed: Packed) -> None:
        """Take over a factor. `refusal` says beforehand whether that is possible."""
        super().__init__()
        self.words: Tensor
        self.scale: Tensor
        self.columns: Tensor
        h, p, r = packed.shape
        self.size = (p, r)
        grid = packed.grid
        bits = grid.bits if isinstance(grid, Grid) else (8,)
        self.nibbles = max(bits) <= 4
        width = -(-r // _COLUMNS) * _COLUMNS
        height = -(-p // _ROWS) * _ROWS
        columns = torch.ones(r) if packed.columns is None else packed.columns.float()
        if self.nibbles:
            columns = columns * torch.tensor([float(one > 0) for one in bits])
        words = torch.empty(
            h, height, width // (2 if self.nibbles else 1), dtype=torch.uint8 if self.nibbles else torch.int8
        )
        for at in range(h):
            words[at] = self._words(packed[at : at + 1], height, width)
        scale = F.pad(packed.scale[..., 0] / 2, (0, height - p))
        held = {"words": words, "scale": scale.bfloat16(), "columns": columns.bfloat16()}
        for name, tensor in held.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def _words(self, one: Packed, height: int, width: int) -> Tensor:
        rounded = one.rounded()
        q = rounded.codes[0].int()
        top = rounded.grid.top(rounded.scale.float()).int().reshape(-1, q.shape[1])
        padding = (0, width - q.shape[1], 0, height - q.shape[0])
        if self.nibbles:
            nibbles = F.pad(q + 8 - (top + 1) // 2, padding)
            return torch._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        return F.pad(2 * q - top, padding).to(torch.int8)

    def forward(
        self, x: Float[Tensor, "s r"], ends: Int[Tensor, " e"], rows: Sequence[int]
    ) -> Float[Tensor, "s p"]:
        """Return W_e x for every sorted token; the parameters are those of `products.grouped`."""
        if torch.compiler.is_compiling():
            return torch.ops.globe.packed(
                x, self.words, self.scale, self.columns, ends, list(rows), self.nibbles, self.size[0]
            )
        return _packed(x, self.words, self.scale, self.columns, ends, rows, self.nibbles, self.size[0])

    def __getitem__(self, row: int) -> Float[Tensor, "p r"]:
        """Return one matrix as numbers: the products of unit vectors are its columns, exactly."""
        r = self.size[1]
        unit, ends = torch.eye(r, dtype=torch.bfloat16), torch.tensor([r])
        return self.forward(unit, ends, [row]).mT


def refusal(packed: Packed, dtype: torch.dtype) -> str | None:
    """Return why a factor can't be multiplied as it is; None if it can."""
    grid = packed.grid
    tables = (grid.bits,) if isinstance(grid, Grid) else grid.tables
    if packed.words.device.type != "cpu" or dtype != torch.bfloat16:
        return "only bfloat16 on a CPU has fast kernels"
    if packed.turned is not None:
        return "its rows were turned"
    if grid.group_count != 1:
        return "its rows have several scales"
    if max(max(table) for table in tables) > 7:
        return "it has columns of 8 bits"
    return None


def _packed(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    columns: Tensor,
    ends: Tensor,
    rows: Sequence[int],
    nibbles: bool,
    height: int,
) -> Tensor:
    spans = spans_of(ends, rows)
    width = words.shape[2] * (2 if nibbles else 1)
    padded = F.pad(x.bfloat16() * columns, (0, width - x.shape[1]))
    offsets = torch.stack([2 * scale, scale], dim=-1)[:, None] if nibbles else scale
    parts = []
    for row, start, stop in spans:
        own = padded[start:stop].contiguous()
        if nibbles:
            offset = offsets[row].expand(width // _COLUMNS, -1, -1).contiguous()
            product = torch._weight_int4pack_mm_for_cpu(own, words[row], _COLUMNS, offset)
        else:
            product = torch._weight_int8pack_mm(own, words[row], offsets[row])
        parts.append(product[:, :height])
    return spread(parts, spans, x.bfloat16(), height).to(x.dtype)


_operator = library.custom_op(
    "globe::packed",
    _packed,
    mutates_args=(),
    schema="(Tensor x, Tensor words, Tensor scale, Tensor columns, Tensor ends, int[] rows, bool nibbles, "
    "int height) -> Tensor",
)


@_operator.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, columns: Tensor, ends: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[-1])
