"""FP8 and int8: one byte a number, and scales of blocks, rows, groups or the tensor.

DeepSeek-V3 and Kimi-K2 call the scales `weight_scale_inv` (they multiply, in spite of the name), compressed-tensors,
FBGEMM and ModelOpt call them `weight_scale`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.checkpoint.quantised.form import Entries, Form, Parts, Settings
from globe.checkpoint.quantised.scales import as_numbers, spread, steps

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _form(scale: str, dtypes: tuple[torch.dtype, ...], takes: tuple[str, ...] = ()) -> Form:
    def shape(entries: Entries, settings: Settings) -> tuple[int, int]:
        rows, columns = entries[""].shape
        steps((rows, columns), entries[scale].shape, settings.block)
        if "_zero_point" in entries:
            steps((rows, columns), entries["_zero_point"].shape, settings.block)
        return rows, columns

    def values(parts: Parts, settings: Settings) -> Float[Tensor, "rows columns"]:
        numbers = parts[""].float()
        if "_zero_point" in parts:
            numbers -= spread(parts["_zero_point"].float(), numbers.shape, settings.block)
        return numbers.mul_(spread(as_numbers(parts[scale]), numbers.shape, settings.block))

    return Form(main="", dtypes=dtypes, needs=(scale,), takes=takes, shape=shape, values=values)


INVERSE_SCALES = _form("_scale_inv", _FP8)
SCALES = _form("_scale", (*_FP8, torch.int8), takes=("_zero_point",))
