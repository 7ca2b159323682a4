"""Schedules of lam, beta and T: pure functions of the step, evaluated outside it."""

from __future__ import annotations

import math


def curve_value(
    kind: str,
    start: float,
    end: float,
    step: int | float,
    steps: int,
    *,
    warmup: float = 0.0,
    hold: float = 0.0,
) -> float:
    """Return the value of a curve at `step` = 0 .. steps - 1 of a fit of `steps` steps.

    With x = step / (steps - 1), the curve stays at `start` up to x = `warmup`, is at `end` from x = 1 -
    `hold` on, and between them goes the way t = 0 .. 1 as

        constant     start, whatever `end` is
        linear       start + (end - start) t
        cosine       start + (end - start) (1 - cos(pi t)) / 2, flat at both ends
        exponential  start (end / start)^t, equal factors in equal times; both ends positive

    `warmup` and `hold` are shares of all steps that sum to at most 1; where they sum to 1 the curve jumps.
    A fit of one step stands at its end (x = 1), and so does any step after the last.

    Raises ValueError on an unknown kind, shares outside [0, 1], and ends an exponential cannot join.
    """
    if not (warmup >= 0 and hold >= 0 and warmup + hold <= 1 + 1e-12):
        raise ValueError(f"schedule warmup={warmup}, hold={hold}: give shares that sum to at most 1")
    t = _progress(step, steps, warmup, hold)
    match kind:
        case "constant":
            return start
        case "linear":
            way = t
        case "cosine":
            way = (1 - math.cos(math.pi * t)) / 2
        case "exponential":
            if start <= 0 or end <= 0:
                raise ValueError(f"schedule start={start}, end={end}: exponential needs positive ends")
            return end if t == 1 else start * (end / start) ** t
        case _:
            raise ValueError(f"schedule kind={kind!r} is not one of constant, linear, cosine, exponential")
    # not start + (end - start) way, which can miss `end` by a rounding and leave a homotopy at 0.9999
    return start * (1 - way) + end * way


def _progress(step: int | float, steps: int, warmup: float, hold: float) -> float:
    """Return how far along the way a step is, 0 to 1. A hold wins over the end of the warm-up at the same step."""
    x = 1.0 if steps <= 1 else min(max(step / (steps - 1), 0.0), 1.0)
    if hold > 0 and x >= 1 - hold:
        return 1.0
    if x <= warmup and (x < 1 or warmup > 0):
        return 0.0
    return min((x - warmup) / (1 - warmup - hold), 1.0)
