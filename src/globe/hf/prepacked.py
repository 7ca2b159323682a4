"""Kept bases in the layout in which oneDNN multiplies bfloat16 matrices on a processor.

A plain matrix is brought into that layout again by every product, which takes about as long as a product with a few
tokens. The operators are those by which `torch.compile` freezes weights; they have no gradient and no public name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from globe.hf.products import spans_of, spread

FEWEST = 3
"""Rows of the smallest product: for one or two tokens it takes longer than for three."""


def can_prepack(x: Tensor, like: Tensor) -> bool:
    """Return whether, in the present mode, x can be multiplied by prepacked matrices of the dtype of `like`."""
    return (
        x.device.type == "cpu"
        and x.dtype == like.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def prepack(matrix: Float[Tensor, "b a"]) -> Tensor:
    """Return the matrix as an opaque tensor of as many bytes, for `prepacked_products`."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())


def prepacked_products(
    x: Float[Tensor, "s a"], matrices: Sequence[Tensor], ends: Int[Tensor, " e"], rows: Sequence[int]
) -> Float[Tensor, "s b"]:
    """Do what `globe.hf.products.grouped` does, with prepacked matrices (b, a)."""
    spans = spans_of(ends, rows)
    parts = [_product(x[start:stop], matrices[row]) for row, start, stop in spans]
    return spread(parts, spans, x, matrices[0].shape[0])


def _product(x: Float[Tensor, "t a"], matrix: Tensor) -> Float[Tensor, "t b"]:
    rows = x if len(x) >= FEWEST else F.pad(x, (0, 0, 0, FEWEST - len(x)))
    return torch.ops.mkldnn._linear_pointwise(rows, matrix, None, "none", [], "")[: len(x)]
