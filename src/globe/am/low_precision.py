"""Where the products inside the conjugate gradients may run in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor


def curvature_dtype(choice: str, like: Tensor) -> torch.dtype:
    """Dtype of the curvature products for a fit on `like`: same, bfloat16 or auto.

    auto is bfloat16 for a float32 fit where matrix units multiply it: a CUDA device of compute capability 8 or more,
    or a CPU with AMX tiles (4.3 times the float32 rate in batches of 88 x 88 x 256, 6.5 times in large products, on one
    thread). A float64 fit stays exact under auto.
    """
    if choice == "bfloat16":
        return torch.bfloat16
    if choice == "same" or like.dtype != torch.float32:
        return like.dtype
    return torch.bfloat16 if _multiplies_bfloat16(like.device) else like.dtype


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported())
    return False
