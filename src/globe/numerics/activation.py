"""The activation phi and its homotopy from linear: phi_lam(y) = (1 - lam) y + lam act(y), entrywise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def phi(Y: Float[Tensor, "*shape"], *, lam: float, activation: str) -> Float[Tensor, "*shape"]:
    """Return phi_lam(Y). `activation` is identity, silu, tanh or gelu (exact, not the tanh approximation)."""
    if lam == 0.0 or activation == "identity":
        return Y
    match activation:
        case "silu":
            act = F.silu(Y)
        case "tanh":
            act = torch.tanh(Y)
        case "gelu":
            act = F.gelu(Y)
        case _:
            raise ValueError(f"activation {activation!r} is not one of identity, silu, tanh, gelu")
    return act if lam == 1.0 else torch.lerp(Y, act, lam)


def phi_prime(
    Y: Float[Tensor, "*shape"],
    *,
    lam: float,
    activation: str,
    image: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"] | None:
    """Return d phi_lam / dY, entrywise; None stands for all ones (linear), which callers use to skip the product.

    `image` is phi_lam(Y) where it is at hand, which saves a second tanh.
    """
    if lam == 0.0 or activation == "identity":
        return None
    match activation:
        case "silu":
            s = torch.sigmoid(Y)
            slope = s * (1 + Y * (1 - s))
        case "tanh":
            act = image if image is not None and lam == 1.0 else torch.tanh(Y)
            slope = act.square().neg_().add_(1)
        case "gelu":
            density = torch.exp(-0.5 * Y * Y) / math.sqrt(2 * math.pi)
            slope = 0.5 * (1 + torch.erf(Y / math.sqrt(2))) + Y * density
        case _:
            raise ValueError(f"activation {activation!r} is not one of identity, silu, tanh, gelu")
    return slope if lam == 1.0 else 1 + lam * (slope - 1)
