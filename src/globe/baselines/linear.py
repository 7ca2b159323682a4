"""What the closed forms give back."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class LinearFactors(NamedTuple):
    """X_i ~ adapters_i sum_j codes_ij bank_j (+ mean)."""

    bank: Float[Tensor, "m r d"]
    codes: Float[Tensor, "n m"]
    adapters: Float[Tensor, "n p r"]
    mean: Float[Tensor, "p d"] | None = None
