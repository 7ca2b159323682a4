"""Integers and FP4 numbers out of the words and bytes they are packed in."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32)
"""The sixteen numbers of FP4 (e2m1): one bit of sign, two of exponent, one of mantissa (OCP MX specification 1.0)."""


def words_of(count: int, bits: int) -> int:
    """Return how many 32-bit words hold `count` integers of `bits` bits without a gap."""
    return -(-count * bits // 32)


def unpack(words: Int[Tensor, "rows words"], bits: int, count: int) -> Int[Tensor, "rows count"]:
    """Return the first `count` unsigned integers of `bits` bits (1 to 8) of every row, the lowest bits first.

    Integers follow each other without a gap, so that one may lie in two words (3 bits: 32 integers in 3 words), as
    GPTQ and compressed-tensors pack them. Where a row has the words of whole integers only, as older files of
    compressed-tensors, the bits that are left over in every word are passed over.
    """
    mask = (1 << bits) - 1
    whole = 32 // bits
    if 32 % bits == 0 or words.shape[-1] == -(-count // whole) != words_of(count, bits):
        shifts = torch.arange(whole, dtype=torch.int32) * bits
        return ((words.unsqueeze(-1) >> shifts) & mask).flatten(-2)[:, :count]
    first = torch.arange(count) * bits
    low = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    pairs = low[:, first // 32] | (low[:, first // 32 + 1] << 32)
    return ((pairs >> (first % 32)) & mask).int()


def unpack_fp4(packed: UInt8[Tensor, "rows bytes"]) -> Float[Tensor, "rows columns"]:
    """Return two FP4 numbers a byte in float32, the low four bits first."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return FP4[pairs.flatten(-2).long()]
