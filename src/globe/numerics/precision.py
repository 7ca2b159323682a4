"""Where float64 work is done: on the tensor's own device, or on the CPU for devices that have no float64."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_WITHOUT_FLOAT64 = ("mps",)


def to_float64(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the same numbers in float64; on the CPU where the tensor's device (MPS) has no float64."""
    device = torch.device("cpu") if tensor.device.type in _WITHOUT_FLOAT64 else tensor.device
    return tensor.to(device=device, dtype=torch.float64)
