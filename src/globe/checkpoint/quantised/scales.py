"""Scales of a tensor, of rows, of groups or of blocks, spread over the matrix they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

E8M0_BIAS = 127


def steps(shape: Sequence[int], scale: Sequence[int], block: tuple[int, int] | None) -> tuple[int, int]:
    """Return how many rows and columns of a matrix of this shape share one of the scales.

    A single scale is for the whole tensor, and scales of shape (rows,) or (rows, 1) are for its rows. Others stand in
    a grid of equal blocks or, where `block` says their size, of blocks of which the last may be cut off. Raises
    ValueError if the scales are no such grid.
    """
    if math.prod(scale) == 1:
        return shape[0], shape[1]
    grid = (*scale, 1) if len(scale) == 1 else scale
    if len(grid) != 2:
        raise ValueError(f"its scales have the shape {list(scale)}")
    found = []
    for size, count, given in zip(shape, grid, block or (None, None), strict=True):
        step = size if count == 1 else 1 if count == size else given or size // max(count, 1)
        if not step or count != -(-size // step):
            raise ValueError(
                f"its scales of shape {list(scale)} do not cover {shape[0]} x {shape[1]} numbers"
            )
        found.append(step)
    return found[0], found[1]


def spread(
    scale: Tensor, shape: Sequence[int], block: tuple[int, int] | None
) -> Float[Tensor, "#rows #columns"]:
    """Return the scales so that they can be multiplied with a matrix of this shape. Raises ValueError as `steps`."""
    rows, columns = steps(shape, scale.shape, block)
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    grid = scale.reshape(-1, 1) if scale.dim() == 1 else scale
    if grid.shape[0] not in (1, shape[0]):
        grid = grid.repeat_interleave(rows, 0)[: shape[0]]
    if grid.shape[1] not in (1, shape[1]):
        grid = grid.repeat_interleave(columns, 1)[:, : shape[1]]
    return grid


def as_numbers(scale: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents of two with a bias of 127 (e8m0)."""
    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scale.shape), scale.int() - E8M0_BIAS)
    return scale.float()
