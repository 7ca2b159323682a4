"""The z-score of a family's experts, its inverse, and how its scale folds into the adapters.

W_i = scale_i * X_i + mean. The scale folds exactly into the adapters (scale_i A_i M_i); a mean folds into
neither factor and stays a stored constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from globe.errors import CheckpointError
from globe.fit.stored_experts import StoredExperts, z_score
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.precision import to_float64


@dataclass(frozen=True, slots=True, eq=False)
class Normalised:
    """Experts of one member (a layer and family) after the z-score, and the constants that undo it."""

    experts: Float[Tensor, "n p d"]
    mean: Tensor | None
    """nothing, one number (), or the mean expert (p, d)"""
    scale: Tensor | None
    """nothing, one number (), one per expert (n,), or one per row (n, p)"""


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Experts of all members of a bank, one below the other."""

    experts: Float[Tensor, "n p d"]
    mean: Tensor | None
    """nothing, one number per member (members,), or one mean expert per member (members, p, d)"""
    scale: Tensor | None
    """nothing, one per expert (n,), or one per row (n, p)"""
    starts: tuple[int, ...]
    """first row of each member, and n at the end"""


def normalise(
    W: Float[Tensor, "n p d"],
    *,
    centre: str,
    scale: str,
    dtype: torch.dtype | None = None,
    group: ProcessGroup = ALONE,
    store: bool = False,
) -> Normalised:
    """Return X = (W - mean) / scale with both constants recorded.

    `centre`: `none`, `scalar` (one mean of all entries), `expert_mean` (the p x d mean over the experts).
    `scale`: `none`, or the root mean square of what centring leaves over all entries (`family`), over an
    expert (`expert`) or over a row (`row`). With `scalar` and `family` that is the usual z-score; where the
    subtracted mean is not the group's own, dividing by the root mean square gives every group the same
    weight in the objective, and a nearly constant group is not blown up as it would be by its own
    deviation.

    Moments are accumulated in float64, expert by expert, whatever the dtype of W. `dtype` is that of the
    result and of the constants; None keeps float32 and float64 and widens the rest to float32. A group in
    which centring leaves nothing but rounding (constant rows, equal experts) gets scale 1. With several processes,
    W are
    this one's experts, none perhaps, and the moments are those of all. `store` keeps W and makes X when
    it is read, with the same bits: `StoredExperts`.

    Raises CheckpointError when an expert holds NaN or infinity, ValueError on an unknown option.
    """
    if centre not in ("none", "scalar", "expert_mean") or scale not in ("none", "family", "expert", "row"):
        raise ValueError(
            f"normalise.centre={centre!r}, normalise.scale={scale!r} is not a known pair of options"
        )
    dtype = dtype or (W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32)
    sizes = _all_row_squares(W, None)
    finite = torch.isfinite(sizes).all(dim=1)
    if not bool(finite.all()):
        broken = int(finite.logical_not().nonzero()[0])
        raise CheckpointError(
            f"expert {broken} of the {W.shape[0]} read holds NaN or infinity: repair the checkpoint"
        )
    mean = _mean(W, centre, dtype, group)
    factor = None if scale == "none" else _scale(W, mean, sizes, scale, dtype, group)
    if store:
        means = None if mean is None else mean.unsqueeze(0)
        own = factor.expand(len(W)) if factor is not None and factor.dim() == 0 else factor
        return Normalised(StoredExperts(W, means, own, (0, len(W)), dtype), mean, factor)
    experts = torch.empty(W.shape, dtype=dtype, device=W.device)
    for row, expert in enumerate(W):
        one = factor if factor is None or factor.dim() == 0 else factor[row]
        experts[row] = z_score(expert, mean, one)
    return Normalised(experts, mean, factor)


def denormalise(
    X: Float[Tensor, "n p d"], mean: Tensor | None, scale: Tensor | None
) -> Float[Tensor, "n p d"]:
    """Return W = scale * X + mean, the inverse of `normalise` up to rounding in the dtype of X."""
    W = fold_scale(X, scale)
    return W if mean is None else W + mean


def fold_scale(adapters: Float[Tensor, "n p r"], scale: Tensor | None) -> Float[Tensor, "n p r"]:
    """Return scale * A: with it, scale * (A_i M_i) + mean = fold_scale(A)_i M_i + mean exactly.

    `scale` is None, one number (), one per expert (n,), or one per row (n, p).
    """
    if scale is None:
        return adapters
    expected = adapters.shape[: scale.dim()]
    if scale.dim() > 2 or scale.shape != expected:
        raise ValueError(
            f"a scale of shape {tuple(scale.shape)} does not fit adapters {tuple(adapters.shape)}"
        )
    return adapters * scale.to(adapters.dtype).reshape(*scale.shape, *[1] * (3 - scale.dim()))


def join(parts: Sequence[Normalised]) -> Joined:
    """Return the members of one bank below each other; one member alone is not copied.

    All members must have been normalised with the same options, so that either all or none have a mean, a
    scale.
    """
    counts = [part.experts.shape[0] for part in parts]
    starts = tuple(accumulate(counts, initial=0))
    means = [part.mean for part in parts if part.mean is not None]
    scales = [
        part.scale.expand(count) if part.scale.dim() == 0 else part.scale
        for part, count in zip(parts, counts, strict=True)
        if part.scale is not None
    ]
    if len(means) not in (0, len(parts)) or len(scales) not in (0, len(parts)):
        raise ValueError("the members of a bank were normalised with different options")
    mean, scale = torch.stack(means) if means else None, torch.cat(scales) if scales else None
    stored = [part.experts for part in parts if isinstance(part.experts, StoredExperts)]
    if len(parts) == 1:
        experts = parts[0].experts
    elif len(stored) == len(parts):
        weights = torch.cat([one.weights for one in stored])
        experts = StoredExperts(weights, mean, scale, starts, stored[0].dtype)
    else:
        experts = torch.cat([part.experts for part in parts])
    return Joined(experts, mean, scale, starts)


def _row_squares(expert: Float[Tensor, "p d"]) -> Float[Tensor, " p"]:
    """Return the sum of squares of each row, in float64."""
    return to_float64(expert).square().sum(dim=1)


def _all_row_squares(W: Float[Tensor, "n p d"], mean: Tensor | None) -> Float[Tensor, "n p"]:
    """Return the sums of squares of the rows of every expert, less the mean, in float64."""
    if not len(W):
        return to_float64(W.new_zeros(W.shape[:2]))
    return torch.stack(
        [_row_squares(one if mean is None else to_float64(one) - to_float64(mean)) for one in W]
    )


def _mean(W: Float[Tensor, "n p d"], centre: str, dtype: torch.dtype, group: ProcessGroup) -> Tensor | None:
    if centre == "none":
        return None
    total = to_float64(W.new_zeros(W.shape[1:]))
    for expert in W:
        total += to_float64(expert)
    total /= group.count(W.shape[0])
    mean = group.sum(total if centre == "expert_mean" else total.mean())
    return mean.to(device=W.device, dtype=dtype)


def _scale(
    W: Float[Tensor, "n p d"],
    mean: Tensor | None,
    sizes: Float[Tensor, "n p"],
    scale: str,
    dtype: torch.dtype,
    group: ProcessGroup,
) -> Float[Tensor, "*groups"]:
    """Return the root mean square of W - mean over each group; 1 where it is rounding beside the group's own size."""
    left = sizes if mean is None else _all_row_squares(W, mean)
    if scale == "family":
        left, sizes = group.gather(left), group.gather(sizes)
    axes = {"family": (0, 1), "expert": (1,), "row": ()}[scale]
    energy, size = (table.mean(dim=axes) if axes else table for table in (left, sizes))
    # the recorded mean is itself rounded to dtype, so a constant group keeps about eps of its size
    nothing = energy <= size * (4 * torch.finfo(dtype).eps) ** 2
    factor = (energy / W.shape[2]).sqrt().to(dtype)
    return torch.where(nothing | (factor == 0), torch.ones_like(factor), factor).to(W.device)
