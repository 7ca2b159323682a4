"""Rotations that spread every entry over many: outliers vanish, and what is rounded looks like normal numbers.

They are made of Hadamard matrices, random signs and a random order, from a seed, and have exact entries.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def hadamard(size: int) -> Float[Tensor, "size size"]:
    """Return the Hadamard matrix of signs for a power of two (Sylvester); rows are orthogonal, not normal."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"{size} is not a power of two")
    signs = torch.ones(1, 1)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], dim=1), torch.cat([signs, -signs], dim=1)])
    return signs


def rotation(size: int, seed: int) -> Float[Tensor, "size size"]:
    """Return a random orthogonal matrix in float32, the same for equal seeds.

    Signs drawn at random times a Hadamard matrix (QuIP#: Tseng et al. 2024, arXiv 2402.04396, section 3) where the size
    is a power of four; otherwise blocks of the largest power of two that divides it (and is not the size), twice, with
    a random order in between, so that each entry meets as many others as it can. Entries are small whole numbers over a
    power of two, so they are exact even in bfloat16; an odd size is left with signs and an order.
    """
    generator = torch.Generator().manual_seed(seed)
    block = size & -size
    once = block == size and size.bit_length() % 2 == 1
    if block == size and not once:
        block //= 2
    signs = torch.block_diag(*[hadamard(block)] * (size // block))

    def draw() -> Float[Tensor, "size size"]:
        flips = 2.0 * torch.randint(2, (size,), generator=generator) - 1.0
        return signs * flips

    if once:
        return draw() / size**0.5
    order = torch.randperm(size, generator=generator)
    return (draw()[:, order] @ draw()) / block
