"""Round matrices to integers of a few bits: groups of columns share a scale in every row.

A row w of k columns is cut into groups of `group` columns. Within a group of b bits, w_j is stored as an integer
q_j in 0 .. 2^b - 1 and read back as (q_j - z) s, with one scale s in bfloat16. A symmetric grid has z = (2^b - 1) / 2,
so that its levels lie at -(2^b - 1)/2 s, .., -s/2, s/2, .., (2^b - 1)/2 s; an asymmetric one stores an integer z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

MOST_BITS = 8
SCALE_DTYPE = torch.bfloat16
_LEAST_FACTOR = {1: 0.2, 2: 0.4, 3: 0.5, 4: 0.6, 5: 0.7}
"""Smallest scale that the search tries, as a share of the one that reaches the largest entry, by bits."""
_TRIED = 17
NOISE = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495, 6: 0.001041, 7: 0.0003035, 8: 0.0000874}
"""Mean squared error of the best uniform grid of so many bits on normally distributed numbers of variance 1 (Max 1960,
table II). Other distributions and shared scales differ by some ten per cent."""


class Rounded(NamedTuple):
    """Integers, scales and offsets of a matrix, or of many: the last axis is that of the columns."""

    codes: UInt8[Tensor, "*rows k"]
    scale: Shaped[Tensor, "*rows groups"]
    """in bfloat16"""
    zero: UInt8[Tensor, "*rows groups"] | None
    """None for a symmetric grid"""
    bits: tuple[int, ...]
    """of each group"""
    group: int
    """columns of a group; the last one may have fewer"""

    def values(self) -> Float[Tensor, "*rows k"]:
        """The numbers that the integers stand for, in float32."""
        levels = centred(self.codes, self.zero, self.bits, self.group)
        return levels * spread_groups(self.scale.float(), self.group, self.codes.shape[-1])

    @property
    def nbits(self) -> int:
        """Bits that integers, scales and offsets take; offsets take as many as an integer of their group."""
        return count_bits(
            self.codes.numel() // max(1, self.codes.shape[-1]),
            self.codes.shape[-1],
            self.bits,
            self.group,
            symmetric=self.zero is None,
        )


def count_bits(rows: int, k: int, bits: Sequence[int], group: int, *, symmetric: bool = True) -> int:
    """Bits of `rows` rounded rows of k columns: integers, scales of 16 bits, and offsets where there are any."""
    each = sum(b * (part.stop - part.start) for b, part in zip(bits, groups_of(k, group), strict=True))
    return rows * (each + 16 * len(bits) + (0 if symmetric else sum(bits)))


def groups_of(k: int, group: int) -> Iterator[slice]:
    """The columns of each group."""
    for start in range(0, k, group):
        yield slice(start, min(k, start + group))


def bits_of_groups(bits: int | Sequence[int], k: int, group: int) -> tuple[int, ...]:
    """One number of bits for each group. Raises ValueError unless each is from 1 to 8 and there is one a group."""
    count = -(-k // group)
    found = (bits,) * count if isinstance(bits, int) else tuple(bits)
    if len(found) != count or not all(1 <= b <= MOST_BITS for b in found) or group < 1:
        raise ValueError(
            f"bits={bits!r} do not fit {k} columns in groups of {group}: give 1 to {MOST_BITS} for each"
        )
    return found


def spread_groups(per_group: Shaped[Tensor, "*rows groups"], group: int, k: int) -> Shaped[Tensor, "*rows k"]:
    """Repeat one number a group for each of its columns."""
    return per_group.repeat_interleave(group, dim=-1)[..., :k]


def offsets(
    zero: UInt8[Tensor, "*rows groups"] | None, bits: Sequence[int], device: torch.device | None = None
) -> Float[Tensor, "*rows groups"]:
    """z of each group: what is stored, or half the largest integer."""
    if zero is not None:
        return zero.float()
    return torch.tensor([(2**b - 1) / 2 for b in bits], device=device)


def centred(
    codes: UInt8[Tensor, "*rows k"],
    zero: UInt8[Tensor, "*rows groups"] | None,
    bits: Sequence[int],
    group: int,
) -> Float[Tensor, "*rows k"]:
    """q - z, in float32."""
    return codes.float() - spread_groups(offsets(zero, bits, codes.device), group, codes.shape[-1])


def round_nearest(
    W: Float[Tensor, "*rows k"],
    bits: int | Sequence[int],
    group: int,
    *,
    symmetric: bool = True,
    searched: bool = True,
) -> Rounded:
    """Round every entry to the nearest level of its group.

    bits       of all groups, or of each
    searched   choose the scale of every group by least squares among `_TRIED` candidates and the best multiple of the
               levels that the best of them gives; without it, the scale reaches the group's largest entry

    The scale of a group of zeros is 0. Raises ValueError where the bits do not fit the groups.
    """
    k = W.shape[-1]
    each = bits_of_groups(bits, k, group)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    scales, zeros = [], []
    for b, part in zip(each, groups_of(k, group), strict=True):
        scale, zero = group_scale(W[..., part], b, symmetric=symmetric, searched=searched)
        codes[..., part] = nearest_level(W[..., part], scale, zero, b)
        scales.append(scale)
        zeros.append(zero)
    stored = None if symmetric else torch.stack(zeros, dim=-1).to(torch.uint8)
    return Rounded(codes, torch.stack(scales, dim=-1).to(SCALE_DTYPE), stored, each, group)


def nearest_level(
    W: Float[Tensor, "*rows g"], scale: Float[Tensor, "*rows"], zero: Float[Tensor, "*rows"], bits: int
) -> UInt8[Tensor, "*rows g"]:
    """The integers of the nearest levels; those of a zero scale are as near to z as they can be."""
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    levels = torch.round(W * inverse[..., None] + zero[..., None])
    return levels.clamp_(0, 2**bits - 1).to(torch.uint8)


def group_scale(
    W: Float[Tensor, "*rows g"], bits: int, *, symmetric: bool, searched: bool
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Scale and offset of each row for one group of columns, in the dtype of W; the scale is one of bfloat16."""
    top = 2**bits - 1
    if symmetric:
        whole = 2 * W.abs().amax(dim=-1) / top
        low = None
    else:
        low = W.amin(dim=-1).clamp_max(0)
        whole = (W.amax(dim=-1).clamp_min(0) - low) / top

    def zero_of(scale: Tensor, shrunk: Tensor) -> Tensor:
        if low is None:
            return torch.full_like(scale, top / 2)
        inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
        return torch.round(-low * shrunk * inverse).clamp_(0, top)

    one = torch.ones_like(whole)
    best = _storable(whole)
    zero = zero_of(best, one)
    if not searched:
        return best, zero
    error = _error(W, best, zero, bits)
    least = _LEAST_FACTOR.get(bits, 0.8)
    for at in range(1, _TRIED):
        factor = 1 - (1 - least) * at / (_TRIED - 1)
        scale = _storable(whole * factor)
        offset = zero_of(scale, one * factor)
        best, zero, error = _better(W, bits, (best, zero, error), (scale, offset))
    levels = nearest_level(W, best, zero, bits).to(W) - zero[..., None]
    size = levels.square().sum(dim=-1)
    fitted = torch.where(size > 0, (W * levels).sum(dim=-1) / size.clamp_min(1e-30), best)
    best, zero, _ = _better(W, bits, (best, zero, error), (_storable(fitted.clamp_min(0)), zero))
    return best, zero


def _better(
    W: Float[Tensor, "*rows g"], bits: int, held: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row, the scale and offset with the smaller error, and that error."""
    error = _error(W, *other, bits)
    wins = error < held[2]
    return (
        torch.where(wins, other[0], held[0]),
        torch.where(wins, other[1], held[1]),
        torch.where(wins, error, held[2]),
    )


def _error(W: Float[Tensor, "*rows g"], scale: Tensor, zero: Tensor, bits: int) -> Float[Tensor, "*rows"]:
    levels = nearest_level(W, scale, zero, bits).to(W) - zero[..., None]
    return (W - levels * scale[..., None]).square().sum(dim=-1)


def _storable(scale: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    return scale.to(SCALE_DTYPE).to(scale)
