"""One budget for many banks: which share each of them gets, so that the sum of their losses is least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MOST = 4096
"""Choices that are carried from bank to bank. Banks of one shape have no more different sums of sizes than that."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What one bank may cost, and what is lost then: option j keeps `sizes[j]` numbers and loses `losses[j]`."""

    sizes: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Reached:
    """Choices for the banks so far that no other one beats, the smallest first."""

    sizes: NDArray[np.int64]
    losses: NDArray[np.float64]
    option: NDArray[np.intp]
    """of the last bank"""
    before: NDArray[np.intp]
    """place of the choice for the banks before it"""


def allocate(
    curves: Sequence[Curve], total: int, known: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Choose an option of every curve, min sum of losses subject to sum of sizes <= total.

    Dynamic programming over the banks: of all choices for the banks so far, those that another one beats in both size
    and loss are dropped. It is exact as long as no more than 4096 remain; of more, the sizes are divided into as many
    equal intervals, and the best of each is kept with its own size, so that the total is never exceeded.

    Parameters
    ----------
    curves
        The options of each bank.
    total
        The most that the chosen sizes may add up to.
    known
        A choice whose sizes fit, such as equal shares; the result is never worse.

    Returns
    -------
    The option of each curve; of equal losses the smaller sum of sizes. None where even the smallest options do not fit.
    """
    nothing = np.zeros(1, dtype=np.intp)
    reached = [_Reached(np.zeros(1, dtype=np.int64), np.zeros(1), nothing, nothing)]
    least = [min(curve.sizes) for curve in curves]
    for at, curve in enumerate(curves):
        following = _extended(reached[-1], curve, total - sum(least[at + 1 :]))
        if not len(following.sizes):
            return None
        reached.append(following)
    place, options = len(reached[-1].sizes) - 1, []
    for step in reversed(reached[1:]):
        options.append(int(step.option[place]))
        place = int(step.before[place])
    chosen = tuple(reversed(options))
    return tuple(known) if known is not None and _loss(curves, known) < _loss(curves, chosen) else chosen


def _loss(curves: Sequence[Curve], chosen: Sequence[int]) -> float:
    return sum(curve.losses[option] for curve, option in zip(curves, chosen, strict=True))


def _extended(reached: _Reached, curve: Curve, room: int) -> _Reached:
    """Return every choice so far with every option of the next bank, without those that are too large or beaten."""
    sizes = (reached.sizes[:, None] + np.array(curve.sizes, dtype=np.int64)).ravel()
    losses = (reached.losses[:, None] + np.array(curve.losses)).ravel()
    fits = np.flatnonzero(sizes <= room)
    order = fits[np.lexsort((losses[fits], sizes[fits]))]
    best = np.minimum.accumulate(losses[order])
    better = np.ones(len(order), dtype=bool)
    better[1:] = losses[order][1:] < best[:-1]
    kept = _thinned(sizes, order[better])
    before, option = np.divmod(kept, len(curve.sizes))
    return _Reached(sizes[kept], losses[kept], option, before)


def _thinned(sizes: NDArray[np.int64], kept: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return at most `_MOST` of them: the smallest, and the largest, hence least lossy, of every interval of sizes."""
    if len(kept) <= _MOST:
        return kept
    first, last = sizes[kept[0]], sizes[kept[-1]]
    interval = (sizes[kept] - first) * (_MOST - 1) // (last - first)
    largest = np.append(interval[1:] != interval[:-1], True)
    largest[0] = True
    return kept[largest]
