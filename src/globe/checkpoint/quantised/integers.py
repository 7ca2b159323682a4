"""Integers of 2 to 8 bits packed in words of 32 bits: compressed-tensors, GPTQ and AWQ."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.checkpoint.quantised.form import Entries, Form, Parts, Settings
from globe.checkpoint.quantised.scales import as_numbers, spread, steps
from globe.checkpoint.quantised.unpacking import unpack, words_of

# --- compressed-tensors: weight_packed (rows, words), weight_scale (rows, groups); unsigned, half of the range is zero


def _columns(entries: Entries, settings: Settings) -> int:
    """Return the columns, which `weight_shape` tells as a value and the headers do only through the groups."""
    groups = entries["_scale"].shape[-1] if len(entries["_scale"].shape) == 2 else 1
    if settings.group and groups > 1:
        return groups * settings.group
    return entries["_packed"].shape[1] * 32 // settings.bits


def _packed_shape(entries: Entries, settings: Settings) -> tuple[int, int]:
    rows, words = entries["_packed"].shape
    columns, bits = _columns(entries, settings), settings.bits
    if words not in (words_of(columns, bits), -(-columns // (32 // bits))):
        raise ValueError(f"its {words} words a row do not hold {columns} integers of {bits} bits")
    if "_g_idx" not in entries:
        steps((rows, columns), entries["_scale"].shape, settings.block)
    return rows, columns


def _packed_values(parts: Parts, settings: Settings) -> Float[Tensor, "rows columns"]:
    packed, bits = parts["_packed"], settings.bits
    scale, half = as_numbers(parts["_scale"]), 1 << (bits - 1)
    groups = scale.shape[1] if scale.dim() == 2 else 1
    columns = groups * settings.group if settings.group and groups > 1 else packed.shape[1] * 32 // bits
    size = (packed.shape[0], columns)
    told = parts.get("_shape")
    if told is not None and told.tolist() != list(size):
        raise ValueError(f"its *_shape says {told.tolist()} where the others hold {list(size)} numbers")
    numbers = (unpack(packed, bits, columns) - half).float()
    zero = parts.get("_zero_point")
    if zero is not None and zero.dtype == torch.int32:  # packed along the rows
        zero = unpack(zero.T, bits, size[0]).T - half
    if (order := parts.get("_g_idx")) is not None and bool((order >= 0).all()):
        numbers -= 0.0 if zero is None else zero.float()[:, order.long()]
        return numbers.mul_(scale[:, order.long()])
    if zero is not None:
        numbers -= spread(zero.float(), size, settings.block)
    return numbers.mul_(spread(scale, size, settings.block))


PACKED = Form(
    main="_packed",
    dtypes=(torch.int32,),
    needs=("_scale",),
    takes=("_zero_point", "_shape", "_g_idx"),
    shape=_packed_shape,
    values=_packed_values,
)

# --- GPTQ and AWQ: the matrix is stored as inputs x outputs


def _gptq_sizes(words: int, order: tuple[int, ...] | None, settings: Settings) -> tuple[int, int]:
    """Return inputs and bits of a matrix; `g_idx` has one number an input, so that bits may differ by layer."""
    if order is None:
        return words * 32 // settings.bits, settings.bits
    inputs = math.prod(order)
    bits = words * 32 // max(inputs, 1)
    if not 1 <= bits <= 8 or words_of(inputs, bits) != words:
        raise ValueError(f"its {words} rows of words do not hold the {inputs} inputs that g_idx has")
    return inputs, bits


def _gptq_shape(entries: Entries, settings: Settings) -> tuple[int, int]:
    words, outputs = entries[".qweight"].shape
    order = entries.get(".g_idx")
    inputs, bits = _gptq_sizes(words, None if order is None else order.shape, settings)
    groups = entries[".scales"].shape[0]
    _check_grid(entries, groups, outputs, bits)
    if order is None and groups != -(-inputs // (settings.group or inputs)):
        raise ValueError(f"it has {groups} groups of scales for {inputs} inputs")
    return outputs, inputs


def _gptq_values(parts: Parts, settings: Settings) -> Float[Tensor, "outputs inputs"]:
    packed, scales = parts[".qweight"], parts[".scales"].float()
    order = parts.get(".g_idx")
    inputs, bits = _gptq_sizes(len(packed), None if order is None else order.shape, settings)
    group = torch.arange(inputs) // (settings.group or inputs) if order is None else order.long()
    if not 0 <= int(group.min()) <= int(group.max()) < len(scales):
        raise ValueError(f"its g_idx names groups other than 0 to {len(scales) - 1}")
    # a zero of no offset wraps around to the largest integer
    zeros = (unpack(parts[".qzeros"], bits, scales.shape[1]) + settings.zero_offset) & ((1 << bits) - 1)
    numbers = unpack(packed.T, bits, inputs).float()
    return numbers.sub_(zeros.float()[group].T).mul_(scales[group].T)


GPTQ = Form(
    main=".qweight",
    dtypes=(torch.int32,),
    needs=(".qzeros", ".scales"),
    takes=(".g_idx",),
    shape=_gptq_shape,
    values=_gptq_values,
    replaced_by=".weight",
)
"""qweight (inputs bits/32, outputs), qzeros (groups, outputs bits/32), scales (groups, outputs), g_idx (inputs)."""

_AWQ_BITS = 4
_AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Place in a word, counted in four bits, of each of eight neighbouring outputs."""


def _awq_shape(entries: Entries, settings: Settings) -> tuple[int, int]:
    inputs, words = entries[".qweight"].shape
    outputs = words * 32 // _AWQ_BITS
    groups = entries[".scales"].shape[0]
    _check_grid(entries, groups, outputs, _AWQ_BITS)
    if inputs % groups:
        raise ValueError(f"its {groups} groups of scales do not cover {inputs} inputs")
    return outputs, inputs


def _awq_values(parts: Parts, settings: Settings) -> Float[Tensor, "outputs inputs"]:
    scales = parts[".scales"].float()
    numbers, zeros = _in_order(parts[".qweight"]).float(), _in_order(parts[".qzeros"]).float()
    return numbers.sub_(spread(zeros, numbers.shape, None)).mul_(spread(scales, numbers.shape, None)).T


def _in_order(packed: Int[Tensor, "rows words"]) -> Int[Tensor, "rows columns"]:
    columns = packed.shape[1] * 32 // _AWQ_BITS
    return unpack(packed, _AWQ_BITS, columns).view(len(packed), -1, 8)[..., _AWQ_ORDER].flatten(-2)


AWQ = Form(
    main=".qweight",
    dtypes=(torch.int32,),
    needs=(".qzeros", ".scales"),
    shape=_awq_shape,
    values=_awq_values,
    replaced_by=".weight",
)
"""qweight (inputs, outputs / 8), qzeros (groups, outputs / 8), scales (groups, outputs); eight outputs interleaved."""


def _check_grid(entries: Entries, groups: int, outputs: int, bits: int) -> None:
    scales, zeros = entries[".scales"].shape, entries[".qzeros"].shape
    if scales != (groups, outputs) or zeros != (groups, words_of(outputs, bits)):
        raise ValueError(
            f"its scales of shape {list(scales)} and qzeros of shape {list(zeros)} do not cover {outputs} outputs"
        )
