"""Round matrices so that their error is small in a metric: min over integers of sum_i tr(R_i E_i H_i E_i^T).

For the adapters of a bank H_i = M_i M_i^T, the Gram matrix of the expert's own basis, or M_i C_i M_i^T with a metric
C_i of inputs; for the weights themselves H_i is the second moment of the expert's inputs. R_i is the second moment of
the inputs where these stand for rows, as those of down do, and the identity elsewhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.bank.rounding import (
    SCALE_DTYPE,
    AnyGrid,
    Grid,
    LevelGrid,
    Rounded,
    StepGrid,
    group_scale,
    nearest_level,
    no_codes,
    part_of,
    pull_cost,
    pull_of,
    round_nearest,
    scale_of,
)
from globe.errors import FitError
from globe.numerics.precision import to_float64

_CHUNK = 1 << 22
"""Numbers of W that are rounded at once."""
RIDGE = 1e-2
"""Added to H for the feedback, relative to its mean diagonal, as in the published method."""


def round_with_feedback(
    W: Float[Tensor, "n o k"],
    H: Float[Tensor, "n k k"],
    grid: AnyGrid,
    *,
    rows: Float[Tensor, "n o o"] | None = None,
    sweeps: int = 2,
) -> Rounded:
    """Round W_i so that its error E counts as tr(R_i E H_i E^T), H_i and R_i symmetric and not negative.

    Column by column, what rounding a column costs is made good by the columns that are still free (GPTQ: Frantar et al.
    2022, arXiv 2210.17323, algorithm 1; the scale of a group is taken when its first column comes, from what the
    columns have become by then). Where `rows` gives R_i, rows are rounded in order instead, and what one costs is made
    good by the rows below; columns count by the diagonal of H_i for that, which the gauge of a bank makes nearly all of
    it. Where rows differ in their bits, columns and rows of few bits come first, so that fine ones make good their
    large errors. A row (with `rows`, a matrix) for which plain rounding to the nearest level is better keeps that.
    `sweeps` rounds of coordinate descent follow: each integer (with `rows`, each row of them), then each scale, takes
    the best value there is with all others as they are. So nothing is ever worse than `round_nearest` makes it, in the
    metric, but for the arithmetic's own rounding.

    Raises FitError where H_i or R_i is not finite or can't be factored.
    """
    n, o, k = W.shape
    parts = []
    size = max(1, _CHUNK // max(1, o * k))
    for start in range(0, n, size):
        part = slice(start, start + size)
        own, below = H[part].to(W), None if rows is None else rows[part].to(W)
        here = grid.of_rows(part)
        if below is not None:
            fed = _feed_rows(W[part], below, here)
        elif isinstance(here, LevelGrid | StepGrid):
            back = _feed_columns(W[part].flip(2), own.flip(1, 2), here.flipped())
            fed = back._replace(codes=back.codes.flip(2), grid=here)
        else:
            fed = _feed_columns(W[part], own, here)
        best = _choose(W[part], own, below, round_nearest(W[part], here), fed)
        if below is None:
            parts.append(_descend(W[part], own, best, sweeps))
        else:
            parts.append(_descend_in_both(W[part], own, below, best, sweeps))
    return Rounded(torch.cat([one.codes for one in parts]), torch.cat([one.scale for one in parts]), grid)


def metric_errors(
    W: Float[Tensor, "n o k"],
    values: Float[Tensor, "n o k"],
    H: Float[Tensor, "n k k"],
    rows: Float[Tensor, "n o o"] | None = None,
) -> Float[Tensor, "n o"]:
    """Return (R_i E H_i E^T)_jj of every row j; their sum over the rows of a matrix is its error."""
    E = values.to(W) - W
    left = E if rows is None else rows.to(W) @ E
    return ((left @ H.to(W)) * E).sum(dim=2)


def elimination(H: Float[Tensor, "n k k"]) -> Float[Tensor, "n k k"]:
    """Return the upper U, (H + ridge)^-1 = U^T U, whose row j over its diagonal is what column j costs later ones."""
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


def _feed_columns(W: Float[Tensor, "n o k"], H: Float[Tensor, "n k k"], grid: AnyGrid) -> Rounded:
    """Round the columns in order; within a group the error is fed column by column, to later groups by one product."""
    U, W, top = elimination(H), W.clone(), grid.top(W)
    codes, scales, pull = no_codes(grid, W), [], pull_of(grid, W)
    for part in grid.groups:
        scale = scale_of(grid, W[:, :, part], top[..., part])
        costs = torch.empty_like(W[:, :, part])
        for j in range(part.start, part.stop):
            own = W[:, :, j]
            q = nearest_level(own[..., None], scale, top[..., j, None], part_of(pull, [j]))[..., 0]
            codes[:, :, j] = q
            costs[:, :, j - part.start] = (own - (q - top[..., j] / 2) * scale) / U[:, j, j, None]
            if j + 1 < part.stop:
                now, rest = slice(j - part.start, j + 1 - part.start), slice(j + 1, part.stop)
                W[:, :, rest] -= costs[:, :, now] * U[:, j : j + 1, rest]
        if part.stop < W.shape[2]:
            W[:, :, part.stop :] -= costs @ U[:, part, part.stop :]
        scales.append(scale)
    return Rounded(codes, torch.stack(scales, dim=-1).to(SCALE_DTYPE), grid)


def _feed_rows(W: Float[Tensor, "n o k"], rows: Float[Tensor, "n o o"], grid: AnyGrid) -> Rounded:
    """Round all columns of a row at once, with scales taken from what the row has become by then.

    Of rows of equal bits those that count most come first, as is usual.
    """
    order = rows.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=isinstance(grid, Grid), stable=True)
    every = torch.arange(len(W), device=W.device)[:, None]
    back = order.argsort(dim=1)
    U = elimination(rows[every[:, None], order[:, :, None], order[:, None]])
    top, pull = grid.top(W).expand(W.shape)[every, order], pull_of(grid, W)
    pull = None if pull is None else pull[every, order]
    steps = grid.scale.to(W)[every, order] if isinstance(grid, StepGrid) else W[:, :, :0]
    codes, scales, W = no_codes(grid, W), [], W[every, order]
    for i in range(W.shape[1]):
        own, reach = W[:, i], top[:, i]
        if isinstance(grid, StepGrid):
            scale = steps[:, i]
        else:
            found = [group_scale(own[:, j], reach[:, j], searched=True) for j in grid.groups]
            scale = torch.stack(found, dim=-1)
        spread = grid.spread(scale)
        drawn = None if pull is None else pull[:, i, :, None]
        codes[:, i] = nearest_level(own[..., None], spread, reach[..., None], drawn)[..., 0]
        cost = (own - (codes[:, i].to(own) - reach / 2) * spread) / U[:, i, i, None]
        W[:, i + 1 :] -= U[:, i, i + 1 :, None] * cost[:, None]
        scales.append(scale)
    return Rounded(codes[every, back], torch.stack(scales, dim=1)[every, back].to(SCALE_DTYPE), grid)


def _choose(
    W: Float[Tensor, "n o k"],
    H: Float[Tensor, "n k k"],
    rows: Float[Tensor, "n o o"] | None,
    one: Rounded,
    other: Rounded,
) -> Rounded:
    """Return, row by row or with `rows` matrix by matrix, the one with the smaller error in the metric."""
    errors = [metric_errors(W, which.values(), H, rows) for which in (other, one)]
    if rows is not None:
        errors = [error.sum(dim=1, keepdim=True).expand_as(error) for error in errors]
    wins = (errors[0] < errors[1])[..., None]
    codes, scale = (torch.where(wins, *pair) for pair in ((other.codes, one.codes), (other.scale, one.scale)))
    return Rounded(codes, scale, one.grid)


def _descend(W: Float[Tensor, "n o k"], H: Float[Tensor, "n k k"], start: Rounded, sweeps: int) -> Rounded:
    """Improve integers and scales by coordinate descent; the gradient E H is kept up to date, column by column."""
    if sweeps == 0:
        return start
    grid, codes, scale = start.grid, start.codes.clone(), start.scale.to(W)
    top = grid.top(W)
    offset, pull = top / 2, pull_of(grid, W)
    diagonal = H.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        gradient = ((codes.to(W) - offset) * grid.spread(scale) - W) @ H
        for at, part in enumerate(grid.groups):
            s = scale[..., at]
            for j in range(part.start, part.stop):
                weight = diagonal[:, j, None]
                value = (codes[..., j].to(W) - offset[..., j]) * s
                wanted = value - gradient[..., j] / weight.clamp_min(1e-30)
                q = nearest_level(wanted[..., None], s, top[..., j, None], part_of(pull, [j]))[..., 0]
                # where neither the scale nor the metric says anything, the integer stays
                q = torch.where((s > 0) & (weight > 0), q, codes[..., j].to(W))
                moved = (q - offset[..., j]) * s - value
                codes[..., j] = q
                gradient += moved[..., None] * H[:, j : j + 1]
            if isinstance(grid, StepGrid):
                continue
            levels = codes[..., part].to(W) - offset[..., part]
            scale[..., at] = _fit_scale(gradient, H, levels, s, part)
    return start._replace(codes=codes, scale=scale.to(SCALE_DTYPE))


def _descend_in_both(
    W: Float[Tensor, "n o k"],
    H: Float[Tensor, "n k k"],
    rows: Float[Tensor, "n o o"],
    start: Rounded,
    sweeps: int,
) -> Rounded:
    """Improve all integers of a row at once, as if columns did not couple, where that lowers the error, then scales."""
    grid, codes, scale = start.grid, start.codes.to(W), start.scale.to(W)
    top = grid.top(W).expand(W.shape)
    offset, pull = top / 2, pull_of(grid, W)
    diagonal, weights = H.diagonal(dim1=1, dim2=2), rows.diagonal(dim1=1, dim2=2)
    pulled = rows @ ((codes - offset) * grid.spread(scale) - W)  # R E, kept up to date
    for _ in range(sweeps):
        for i in range(W.shape[1]):
            spread = grid.spread(scale[:, i])
            slope, size = (pulled[:, i, None] @ H)[:, 0], weights[:, i, None] * diagonal
            value = (codes[:, i] - offset[:, i]) * spread
            free = (spread > 0) & (size > 0)
            wanted = value - slope / size.clamp_min(1e-30)
            drawn = None if pull is None else pull[:, i, :, None]
            q = nearest_level(wanted[..., None], spread, top[:, i, :, None], drawn)[..., 0]
            q = torch.where(free, q, codes[:, i])
            move = (q - codes[:, i]) * spread
            curve = weights[:, i] * ((move[:, None] @ H)[:, 0] * move).sum(dim=1)
            if drawn is not None:
                both = (pull_cost(one - offset[:, i], drawn[..., 0]) for one in (q, codes[:, i]))
                curve += (size * spread.square() * (next(both) - next(both))).sum(dim=1)
            gains = (2 * (slope * move).sum(dim=1) + curve < 0)[:, None]
            codes[:, i] = torch.where(gains, q, codes[:, i])
            move = torch.where(gains, move, torch.zeros_like(move))
            for at, part in enumerate(() if isinstance(grid, StepGrid) else grid.groups):
                levels = codes[:, i, part] - offset[:, i, part]
                through = levels[:, None] @ H[:, part]
                along = slope + weights[:, i, None] * (move[:, None] @ H)[:, 0]
                size_of = weights[:, i] * (through[:, 0, part] * levels).sum(dim=1)
                step = _worth(scale[:, i, at], (along[:, part] * levels).sum(dim=1), size_of)
                scale[:, i, at] += step
                move[:, part] += step[:, None] * levels
            pulled += rows[:, :, i, None] * move[:, None]
    return start._replace(codes=codes.to(start.codes.dtype), scale=scale.to(SCALE_DTYPE))


def _fit_scale(
    gradient: Float[Tensor, "n o k"],
    H: Float[Tensor, "n k k"],
    levels: Float[Tensor, "n o g"],
    scale: Float[Tensor, "n o"],
    part: slice,
) -> Float[Tensor, "n o"]:
    """Return the best scale of a group with all else as it is, in bfloat16; `gradient` is updated in place."""
    through = levels @ H[:, part]
    size = (through[..., part] * levels).sum(dim=2)
    slope = (gradient[..., part] * levels).sum(dim=2)
    step = _worth(scale, slope, size)
    gradient += step[..., None] * through
    return scale + step


def _worth(scale: Tensor, slope: Tensor, size: Tensor) -> Tensor:
    """Return the step to the best scale for an error that falls by `slope` and curves by `size`, as far as it gains."""
    wanted = torch.where(size > 0, scale - slope / size.clamp_min(1e-30), scale).clamp_min(0)
    step = wanted.to(SCALE_DTYPE).to(scale) - scale
    # bfloat16 is coarse: what it makes of the best scale need not be better than the one before
    gains = 2 * step * slope + step.square() * size < 0
    return torch.where(gains, step, torch.zeros_like(step))
