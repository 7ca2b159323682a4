"""Where the products inside the conjugate gradients may run in bfloat16."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_SMALL = 1 << 15
"""Numbers of an expert below which float32 is as fast."""


def curvature_dtype(choice: str, like: Float[Tensor, "n p d"]) -> torch.dtype:
    """Return the dtype of the curvature products for a fit on the experts `like`: same, bfloat16 or auto.

    auto is bfloat16 for a float32 fit of experts of 2^15 numbers or more where the hardware multiplies bfloat16: a
    CUDA device of compute capability 8 or more, or a CPU with AMX tiles or AVX-512 BF16 instructions. It depends on
    the machine alone, never on a measured time. A float64 fit stays exact under auto.
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
        # private names, which other versions of PyTorch may lack
        asked = (getattr(torch.cpu, f"_is_{unit}_supported", None) for unit in ("amx_tile", "avx512_bf16"))
        return any(bool(ask()) for ask in asked if ask is not None)
    return False
