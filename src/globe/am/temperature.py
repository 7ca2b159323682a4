"""Sparsity of the codes: the support at a temperature, the law that steers the temperature, the prune."""

from __future__ import annotations

import math

import torch
from entmax import entmax15, sparsemax
from jaxtyping import Bool, Float
from torch import Tensor

from globe.errors import FitError

LOWEST, HIGHEST = 1e-6, 1e6
"""Bounds of T: a target no temperature reaches (equal logits) must not drive it to zero or infinity."""


def next_temperature(T: float, median: float, target: float, *, eta: float, clamp: float = 0.1) -> float:
    """Take one step of the support control: T exp(-c) with c = eta (median / target - 1) within [-clamp, clamp].

    With alpha = map(z / T) a higher T makes denser codes, so a median support above its target must lower
    T: hence the minus. (With the sign the other way round the loop drives the support away from the
    target.) eta in [0.02, 0.1] settles; 0.3 was seen to flip a median between 1 and 8. The clamp keeps a
    first step from a dense start (median / target = 15, say) as gentle as the others.

    Returns T unchanged where the target is met; the result stays within [1e-6, 1e6]. Raises ValueError
    unless T, target and eta are positive.
    """
    if not (T > 0 and target > 0 and eta > 0):
        raise ValueError(f"T={T}, codes.target_support={target}, codes.eta={eta} must all be positive")
    change = max(-clamp, min(clamp, eta * (median / target - 1)))
    return min(HIGHEST, max(LOWEST, T * math.exp(-change)))


def simplex_weights(z: Float[Tensor, "n m"], T: float, *, code_map: str) -> Float[Tensor, "n m"]:
    """Return map(z_i / T), map = entmax15 or sparsemax: points of the simplex with exact zeros (Peters et al. 2019).

    Computed in float32 or wider. Raises FitError when a logit is NaN or plus infinity or a row has no
    finite one, ValueError on an unknown map.
    """
    if code_map not in ("entmax15", "sparsemax"):
        raise ValueError(f"codes.map={code_map!r} is not one of entmax15, sparsemax")
    wide = z if z.dtype == torch.float64 else z.float()
    top = wide.amax(dim=1, keepdim=True)
    if not bool(torch.isfinite(top).all()):
        raise FitError("the code logits are no longer finite: lower codes.eta or codes.l1 and start again")
    # the map ignores a shift of a row; without it large logits over a small T would overflow
    shifted = (wide - top) / T
    return entmax15(shifted, dim=1) if code_map == "entmax15" else sparsemax(shifted, dim=1)


def support_from_logits(z: Float[Tensor, "n m"], T: float, *, code_map: str) -> Bool[Tensor, "n m"]:
    """Return the atoms that map(z_i / T) gives a positive weight; never empty, since the largest logit is always in.

    Entmax chooses the support, least squares then chooses the values on it (`nnls_codes(support=...)`).
    """
    support = simplex_weights(z, T, code_map=code_map) > 0
    return support.scatter(1, z.argmax(dim=1, keepdim=True), True)


def prune(codes: Float[Tensor, "n m"], eps: float) -> Float[Tensor, "n m"]:
    """Set codes below `eps` times the expert's largest to zero, 0 <= eps < 1.

    The largest code itself always stays, so no expert with a code is left without; a row of zeros stays one.
    """
    if not 0 <= eps < 1:
        raise ValueError(f"codes.prune={eps}: give a share from 0 to below 1")
    floor = eps * codes.amax(dim=1, keepdim=True)
    return torch.where(codes < floor, torch.zeros_like(codes), codes)
