"""Products of sorted tokens with the matrices of their experts: kept ones, or ones composed tile by tile.

Tokens are sorted by expert and `ends` says where each expert's rows end, so every shape follows from the number of
tokens alone. Under `torch.compile` the products are operators of their own, since the rows of one expert are known at
run time only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, library

from globe.numerics.activation import phi

SLICE_BYTES = 1 << 18
"""Bytes of the rows of one basis that are composed at once: enough for an efficient product, few enough for a cache."""
EXPERTS_AT_ONCE = 16
"""Experts whose rows are composed together, so that a tile of 4 MiB and its part of the bank stay in the cache."""


class Span(NamedTuple):
    """Rows [start, stop) of the sorted tokens are multiplied by matrix `row`."""

    row: int
    start: int
    stop: int


class Routing(NamedTuple):
    """Pairs of a token and one of its experts, sorted by expert; an expert of `len(ends)` is of another device."""

    tokens: Int[Tensor, " s"]
    experts: Int[Tensor, " s"]
    ends: Int[Tensor, " e"]
    """number of pairs of the experts up to and including each"""


def spans_of(ends: Int[Tensor, " e"], rows: Sequence[int]) -> list[Span]:
    """Return the span of every expert that has a matrix (a row of at least 0) and got a token."""
    found, start = [], 0
    for row, stop in zip(rows, ends.tolist(), strict=True):
        if row >= 0 and stop > start:
            found.append(Span(row, start, stop))
        start = stop
    return found


def grouped(
    x: Float[Tensor, "s a"],
    weights: Float[Tensor, "h ..."],
    ends: Int[Tensor, " e"],
    rows: Sequence[int],
    *,
    transposed: bool = False,
) -> Float[Tensor, "s b"]:
    """Multiply every sorted token by the matrix of its expert.

    Parameters
    ----------
    x: tokens, sorted by expert.
    weights: matrices (h, b, a), or (h, a, b) if `transposed`.
    ends: number of tokens of the experts up to and including each.
    rows: for every expert its matrix, or -1 where it has none here.

    Returns W_e x; zeros for tokens of experts without a matrix, and for those behind the last end.
    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return torch.ops.globe.grouped(x, weights, ends, list(rows), transposed)
    return _grouped(x, weights, ends, rows, transposed)


def _grouped(
    x: Tensor, weights: Tensor, ends: Tensor, rows: Sequence[int], transposed: bool = False
) -> Tensor:
    if x.is_cuda and list(rows) == list(range(len(weights))) and _aligned(x, weights):
        # not run on a GPU yet; what stands behind the last end is left as it is found
        out = F.grouped_mm(x, weights if transposed else weights.mT, offs=ends.to(torch.int32))
        behind = torch.arange(len(x), device=x.device) >= ends[-1]
        return out.masked_fill(behind[:, None], 0)
    spans = spans_of(ends, rows)
    width = weights.shape[2 if transposed else 1]
    parts = [
        _product(x[start:stop], weights[row].mT if transposed else weights[row]) for row, start, stop in spans
    ]
    return spread(parts, spans, x, width)


def _aligned(x: Tensor, weights: Tensor) -> bool:
    """Return whether all rows begin at multiples of 16 bytes, as the grouped product of CUDA wants."""
    return all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])


def _product(x: Float[Tensor, "t a"], weight: Float[Tensor, "b a"]) -> Float[Tensor, "t b"]:
    """Return x W^T, as PyTorch computes it soonest on the processor for one, two or three tokens."""
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        if len(x) == 1 and x.dtype == torch.bfloat16:  # a product of a single row is slower than that of two
            return F.linear(x.expand(2, -1), weight)[:1]
        if len(x) in (2, 3) and x.dtype == torch.float32:  # as a product of narrow columns twice as fast
            return (weight @ x.mT).mT
    return F.linear(x, weight)


def spread(parts: list[Tensor], spans: Sequence[Span], x: Tensor, width: int) -> Tensor:
    """Put the parts of all spans below each other, with zeros for the tokens that are in none."""
    pieces, at, like = [], 0, parts[0] if parts else x
    for part, span in zip(parts, spans, strict=True):
        if span.start > at:
            pieces.append(like.new_zeros(span.start - at, width))
        pieces.append(part)
        at = span.stop
    if at < len(x) or not pieces:
        pieces.append(like.new_zeros(len(x) - at, width))
    return torch.cat(pieces)


def through_bank(
    x: Float[Tensor, "s a"],
    codes: Float[Tensor, "h m"],
    bank: Sequence[Tensor],
    ends: Int[Tensor, " e"],
    rows: Sequence[int],
    *,
    lam: float,
    activation: str,
    transposed: bool = False,
) -> Float[Tensor, "s b"]:
    """Multiply every sorted token by the basis of its expert, which is never whole in memory.

    M_e = phi_lam(sum_j alpha_ej B_j), (r, d), is composed some rows at a time, for the experts that got tokens, in the
    dtype of the factors. Other parameters and the result are those of `grouped`, with matrices M_e.

    Parameters
    ----------
    codes: alpha, a row of m for every basis.
    bank: the atoms (m, r, d), or both factors (m, r, k) and (m, k, d) of low-rank ones, whose rows are formed once.
    transposed: multiply by M_e^T; the sum over its rows is taken in float32 or wider.
    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return torch.ops.globe.through_bank(
            x, codes, list(bank), ends, list(rows), lam, activation, transposed
        )
    return _through_bank(x, codes, bank, ends, rows, lam, activation, transposed)


def _through_bank(
    x: Tensor,
    codes: Tensor,
    bank: Sequence[Tensor],
    ends: Tensor,
    rows: Sequence[int],
    lam: float,
    activation: str,
    transposed: bool,
) -> Tensor:
    spans = spans_of(ends, rows)
    r, d = bank[0].shape[1], bank[-1].shape[2]
    width = d if transposed else r
    if not spans:
        return x.new_zeros(len(x), width)
    hit = codes[[span.row for span in spans]]
    step = max(1, SLICE_BYTES // (d * hit.element_size()))
    columns: list[Tensor] = []
    total: Tensor | None = None
    for first in range(0, r, step):
        at = slice(first, min(first + step, r))
        atoms = bank[0][:, at] if len(bank) == 1 else bank[0][:, at] @ bank[1]
        slices = _slices(hit, atoms, lam, activation)
        if transposed:
            parts = [_product(x[s.start : s.stop, at], one.mT) for s, one in zip(spans, slices, strict=True)]
            wide = torch.cat(parts).to(torch.promote_types(x.dtype, torch.float32))
            total = wide if total is None else total + wide
        else:
            parts = [_product(x[s.start : s.stop], one) for s, one in zip(spans, slices, strict=True)]
            columns.append(torch.cat(parts))
    product = torch.cat(columns, dim=1) if total is None else total.to(x.dtype)
    sizes = [span.stop - span.start for span in spans]
    return spread(list(product.split(sizes)), spans, x, width)


def _slices(
    codes: Float[Tensor, "h m"], atoms: Float[Tensor, "m q d"], lam: float, activation: str
) -> Iterator[Float[Tensor, "q d"]]:
    """Compose some rows of the bases of all experts, no more than a tile before they are asked for."""
    m, q, d = atoms.shape
    flat = atoms.reshape(m, q * d)
    for first in range(0, len(codes), EXPERTS_AT_ONCE):
        mixed = codes[first : first + EXPERTS_AT_ONCE] @ flat
        yield from _activated(mixed, lam, activation).view(-1, q, d).unbind()


def _activated(mixed: Float[Tensor, "h qd"], lam: float, activation: str) -> Float[Tensor, "h qd"]:
    """Return phi_lam, in place where it can be, since a second tile would push the first one out of the cache."""
    if lam == 1.0 and activation == "silu" and not torch.is_grad_enabled():
        return F.silu(mixed, inplace=True)
    return phi(mixed, lam=lam, activation=activation)


_grouped_operator = library.custom_op(
    "globe::grouped",
    _grouped,
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor ends, int[] rows, bool transposed) -> Tensor",
)
_bank_operator = library.custom_op(
    "globe::through_bank",
    _through_bank,
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor[] bank, Tensor ends, int[] rows, float lam, str activation, "
    "bool transposed) -> Tensor",
)


@_grouped_operator.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor, rows: Sequence[int], transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[2 if transposed else 1])


@_bank_operator.register_fake
def _(
    x: Tensor, codes: Tensor, bank: Sequence[Tensor], ends: Tensor, rows: Sequence[int], *rest: object
) -> Tensor:
    return x.new_empty(x.shape[0], bank[-1].shape[2] if rest[-1] else bank[0].shape[1])
