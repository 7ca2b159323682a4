"""Where the products inside the conjugate gradients may run in bfloat16."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_SMALL = 1 << 15
"""Numbers of an expert. In 3 CPU seconds with AMX, bfloat16 and float32 gave on 16 x 44 x 64 0.3488 and 0.3479, on
48 x 56 x 112 0.3215 both, on 12 x 128 x 160 0.1505 and 0.1507; on 60 x 176 x 256 a product takes 0.6 of the time."""


def curvature_dtype(choice: str, like: Float[Tensor, "n p d"]) -> torch.dtype:
    """Dtype of the curvature products for a fit on the experts `like`: same, bfloat16 or auto.

    auto is bfloat16 for a float32 fit of experts of 2^15 numbers or more where matrix units multiply it: a CUDA
    device of compute capability 8 or more, or a CPU with AMX tiles (4.3 times the float32 rate in batches of
    88 x 88 x 256, 6.5 times in large products, on one thread). A float64 fit stays exact under auto.
    """
    if choice == "bfloat16":
        return torch.bfloat16
    if choice == "same" or like.dtype != torch.float32:
        return like.dtype
    large = like.shape[1] * like.shape[2] >= _SMALL
    return torch.bfloat16 if large and _multiplies_bfloat16(like.device) else like.dtype


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported())
    return False
