"""Round matrices so that their error is small in a metric: min over integers of sum_i tr(E_i H_i E_i^T).

For the adapters of a bank H_i = M_i M_i^T, the Gram matrix of the expert's own basis, or M_i C M_i^T with a metric C of
inputs; for the weights themselves H_i is the second moment of the expert's inputs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.bank.rounding import SCALE_DTYPE, Grid, Rounded, group_scale, nearest_level, round_nearest
from globe.errors import FitError
from globe.numerics.precision import to_float64

_CHUNK = 1 << 22
"""Numbers of W that are rounded at once."""
RIDGE = 1e-2
"""Added to H for the feedback, relative to its mean diagonal, as in the published method."""


def round_with_feedback(
    W: Float[Tensor, "n o k"],
    H: Float[Tensor, "n k k"],
    grid: Grid,
    *,
    sweeps: int = 2,
) -> Rounded:
    """Round the rows of W_i so that their error e counts as e H_i e^T, H_i symmetric and not negative.

    Column by column, what rounding a column costs is made good by the columns that are still free (GPTQ: Frantar et al.
    2022, arXiv 2210.17323, algorithm 1; the scale of a group is taken when its first column comes, from what the
    columns have become by then). A row for which plain rounding to the nearest level is better keeps that. `sweeps`
    rounds of coordinate descent follow: each integer, then each scale, takes the best value there is with all others
    as they are. So no row is ever worse than `round_nearest` makes it, in the metric, but for the arithmetic's own
    rounding.

    Raises FitError where H_i is not finite or can't be factored.
    """
    n, o, k = W.shape
    parts = []
    size = max(1, _CHUNK // max(1, o * k))
    for start in range(0, n, size):
        part = slice(start, start + size)
        own = H[part].to(W)
        fed = _feed(W[part], _elimination(own), grid)
        parts.append(_descend(W[part], own, _choose(W[part], own, round_nearest(W[part], grid), fed), sweeps))
    return Rounded(torch.cat([one.codes for one in parts]), torch.cat([one.scale for one in parts]), grid)


def metric_errors(
    W: Float[Tensor, "n o k"], values: Float[Tensor, "n o k"], H: Float[Tensor, "n k k"]
) -> Float[Tensor, "n o"]:
    """e H_i e^T of every row."""
    E = values.to(W) - W
    return ((E @ H.to(W)) * E).sum(dim=2)


def _elimination(H: Float[Tensor, "n k k"]) -> Float[Tensor, "n k k"]:
    """Upper U with (H + ridge)^-1 = U^T U: row j of U, over its diagonal, says what column j costs the later ones."""
    wide = to_float64(H)
    mean = wide.diagonal(dim1=1, dim2=2).mean(dim=1)
    if not bool(torch.isfinite(mean).all()):
        raise FitError("the metric of rounding is not finite: check the weights, or use dtype=float64")
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    eye = torch.eye(H.shape[1], dtype=wide.dtype, device=wide.device)
    damped = wide / mean[:, None, None] + RIDGE * eye
    lower, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()):
        raise FitError("the metric of rounding can't be factored: use dtype=float64, or a smaller bank.r")
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(info.any()):
        raise FitError("the metric of rounding can't be inverted: use dtype=float64, or a smaller bank.r")
    return upper.to(H)


def _feed(W: Float[Tensor, "n o k"], U: Float[Tensor, "n k k"], grid: Grid) -> Rounded:
    """Round the columns in order; within a group the error is fed column by column, to later groups by one product."""
    W, top = W.clone(), grid.top(W)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    scales = []
    for part in grid.groups:
        scale = group_scale(W[:, :, part], grid.bits[part], searched=True)
        costs = torch.empty_like(W[:, :, part])
        for j in range(part.start, part.stop):
            own = W[:, :, j]
            q = nearest_level(own[..., None], scale, top[j, None])[..., 0]
            codes[:, :, j] = q
            costs[:, :, j - part.start] = (own - (q.to(own) - top[j] / 2) * scale) / U[:, j, j, None]
            if j + 1 < part.stop:
                now, rest = slice(j - part.start, j + 1 - part.start), slice(j + 1, part.stop)
                W[:, :, rest] -= costs[:, :, now] * U[:, j : j + 1, rest]
        if part.stop < W.shape[2]:
            W[:, :, part.stop :] -= costs @ U[:, part, part.stop :]
        scales.append(scale)
    return Rounded(codes, torch.stack(scales, dim=-1).to(SCALE_DTYPE), grid)


def _choose(W: Float[Tensor, "n o k"], H: Float[Tensor, "n k k"], one: Rounded, other: Rounded) -> Rounded:
    """Return, row by row, the one with the smaller error in the metric."""
    wins = (metric_errors(W, other.values(), H) < metric_errors(W, one.values(), H))[..., None]
    codes, scale = (torch.where(wins, *pair) for pair in ((other.codes, one.codes), (other.scale, one.scale)))
    return Rounded(codes, scale, one.grid)


def _descend(W: Float[Tensor, "n o k"], H: Float[Tensor, "n k k"], start: Rounded, sweeps: int) -> Rounded:
    """Coordinate descent on integers and scales; the gradient E H is kept up to date, column by column."""
    if sweeps == 0:
        return start
    grid, codes, scale = start.grid, start.codes.clone(), start.scale.to(W)
    top = grid.top(W)
    offset = top / 2
    diagonal = H.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        gradient = ((codes.to(W) - offset) * grid.spread(scale) - W) @ H
        for at, part in enumerate(grid.groups):
            s = scale[..., at]
            for j in range(part.start, part.stop):
                weight = diagonal[:, j, None]
                value = (codes[..., j].to(W) - offset[j]) * s
                wanted = value - gradient[..., j] / weight.clamp_min(1e-30)
                q = nearest_level(wanted[..., None], s, top[j, None])[..., 0]
                # where neither the scale nor the metric says anything, the integer stays
                q = torch.where((s > 0) & (weight > 0), q, codes[..., j])
                moved = (q.to(W) - offset[j]) * s - value
                codes[..., j] = q
                gradient += moved[..., None] * H[:, j : j + 1]
            levels = codes[..., part].to(W) - offset[part]
            scale[..., at] = _fit_scale(gradient, H, levels, s, part)
    return start._replace(codes=codes, scale=scale.to(SCALE_DTYPE))


def _fit_scale(
    gradient: Float[Tensor, "n o k"],
    H: Float[Tensor, "n k k"],
    levels: Float[Tensor, "n o g"],
    scale: Float[Tensor, "n o"],
    part: slice,
) -> Float[Tensor, "n o"]:
    """The best scale of a group with all else as it is, as far as bfloat16 has it; `gradient` follows, in place."""
    through = levels @ H[:, part]
    size = (through[..., part] * levels).sum(dim=2)
    slope = (gradient[..., part] * levels).sum(dim=2)
    wanted = torch.where(size > 0, scale - slope / size.clamp_min(1e-30), scale).clamp_min(0)
    stored = wanted.to(SCALE_DTYPE).to(scale)
    step = stored - scale
    # bfloat16 is coarse: what it makes of the best scale need not be better than the one before
    gains = 2 * step * slope + step.square() * size < 0
    step = torch.where(gains, step, torch.zeros_like(step))
    gradient += step[..., None] * through
    return scale + step
