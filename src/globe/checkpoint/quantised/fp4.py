"""FP4 (e2m1): two numbers a byte, and scales of 32 (MXFP4) or 16 (NVFP4) numbers of a row."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.checkpoint.quantised.form import Entries, Form, Parts, Settings
from globe.checkpoint.quantised.scales import as_numbers, spread, steps
from globe.checkpoint.quantised.unpacking import unpack_fp4


def _blocks_shape(entries: Entries, settings: Settings) -> tuple[int, int]:
    outputs, groups, width = entries["_blocks"].shape
    scales = entries["_scales"].shape
    if scales != (outputs, groups):
        raise ValueError(f"its scales of shape {list(scales)} do not cover {outputs} x {groups} blocks")
    return groups * width * 2, outputs


def _blocks_values(parts: Parts, settings: Settings) -> Float[Tensor, "inputs outputs"]:
    blocks = parts["_blocks"]
    numbers = unpack_fp4(blocks.flatten(-2))
    return (numbers * spread(as_numbers(parts["_scales"]), numbers.shape, None)).T


BLOCKS = Form(
    main="_blocks",
    dtypes=(torch.uint8,),
    needs=("_scales",),
    shape=_blocks_shape,
    values=_blocks_values,
    axes=3,
)
"""gpt-oss: bytes (outputs, inputs / 32, 16) and exponents (outputs, inputs / 32), for a matrix of inputs x outputs."""


def _rows_shape(main: str, whole: str, entries: Entries, settings: Settings) -> tuple[int, int]:
    rows, width = entries[main].shape
    scale = entries["_scale"]
    if settings.bits != 4:
        raise ValueError(f"its numbers have {settings.bits} bits where 4 are read")
    if scale.dtype != torch.uint8 and whole not in entries:
        raise ValueError(f"its scale of the whole tensor, *{whole}, is missing")
    steps((rows, 2 * width), scale.shape, None)
    return rows, 2 * width


def _packed_shape(entries: Entries, settings: Settings) -> tuple[int, int]:
    return _rows_shape("_packed", "_global_scale", entries, settings)


def _packed_values(parts: Parts, settings: Settings) -> Float[Tensor, "rows columns"]:
    scale = as_numbers(parts["_scale"])
    if "_global_scale" in parts:  # NVFP4; the scales are kept multiplied by it
        scale = scale / parts["_global_scale"].float().reshape(1, 1)
    numbers = unpack_fp4(parts["_packed"])
    return numbers.mul_(spread(scale, numbers.shape, None))


PACKED = Form(
    main="_packed",
    dtypes=(torch.uint8,),
    needs=("_scale",),
    takes=("_global_scale",),
    shape=_packed_shape,
    values=_packed_values,
)
"""compressed-tensors: `weight_packed`, and FP8 `weight_scale` over `weight_global_scale`, or exponents (MXFP4)."""


def _modelopt_shape(entries: Entries, settings: Settings) -> tuple[int, int]:
    return _rows_shape("", "_scale_2", entries, settings)


def _modelopt_values(parts: Parts, settings: Settings) -> Float[Tensor, "rows columns"]:
    numbers = unpack_fp4(parts[""])
    scale = as_numbers(parts["_scale"]) * parts["_scale_2"].float().reshape(1, 1)
    return numbers.mul_(spread(scale, numbers.shape, None))


MODELOPT = Form(
    main="",
    dtypes=(torch.uint8,),
    needs=("_scale", "_scale_2"),
    shape=_modelopt_shape,
    values=_modelopt_values,
)
"""NVFP4 of NVIDIA's ModelOpt: `weight`, `weight_scale` in FP8, and `weight_scale_2` of the tensor, which multiplies."""
