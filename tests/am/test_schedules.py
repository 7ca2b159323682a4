"""Curves: exact ends, warm-up and hold counted in steps, monotone ways, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from globe.am.schedules import curve_value

WAYS = ("linear", "cosine", "exponential")
SHARES = st.integers(0, 20).map(lambda k: k / 20)


def trace(
    kind: str, start: float, end: float, steps: int, warmup: float = 0.0, hold: float = 0.0
) -> list[float]:
    return [curve_value(kind, start, end, step, steps, warmup=warmup, hold=hold) for step in range(steps)]


def test_known_values() -> None:
    assert trace("linear", 0.0, 1.0, 5) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    quarter = (1 - math.sqrt(0.5)) / 2
    assert trace("cosine", 0.0, 1.0, 5) == pytest.approx([0, quarter, 0.5, 1 - quarter, 1])
    assert trace("exponential", 1.0, 16.0, 5) == pytest.approx([1, 2, 4, 8, 16])
    assert trace("constant", 0.3, 0.9, 5) == [0.3] * 5


def test_warmup_and_hold_are_shares_of_all_steps() -> None:
    assert trace("linear", 0.0, 1.0, 11, warmup=0.2, hold=0.3) == pytest.approx(
        [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    )


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize(
    ("warmup", "hold", "expected"),
    [
        (1.0, 0.0, [2.0] * 5),
        (0.0, 1.0, [0.5] * 5),
        (0.5, 0.5, [2.0, 2.0, 0.5, 0.5, 0.5]),
    ],
)
def test_shares_that_leave_no_way_jump(kind: str, warmup: float, hold: float, expected: list[float]) -> None:
    assert trace(kind, 2.0, 0.5, 5, warmup, hold) == expected


@pytest.mark.parametrize("kind", WAYS)
def test_a_fit_of_one_step_stands_at_the_end(kind: str) -> None:
    assert trace(kind, 2.0, 0.5, 1) == [0.5]
    assert trace(kind, 2.0, 0.5, 1, warmup=0.3, hold=0.2) == [0.5]
    assert trace(kind, 2.0, 0.5, 1, warmup=1.0) == [2.0]


@given(st.sampled_from(WAYS), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(2, 60), SHARES, SHARES)
def test_curves_go_from_start_to_end_and_never_back(
    kind: str, start: float, end: float, steps: int, warmup: float, hold: float
) -> None:
    assume(warmup + hold <= 1)
    values = trace(kind, start, end, steps, warmup, hold)
    if hold < 1:
        assert values[0] == start
    if warmup < 1:
        # exactly: a homotopy must not end at 0.9999
        assert values[-1] == end
    rising = [b - a for a, b in itertools.pairwise(values)]
    sign = 1 if end > start else -1
    assert all(sign * difference >= -1e-12 * max(start, end) for difference in rising)
    assert curve_value(kind, start, end, steps + 5, steps, warmup=warmup, hold=hold) == values[-1]


@pytest.mark.parametrize(
    ("kind", "start", "end", "shares", "words"),
    [
        ("quadratic", 0.0, 1.0, {}, "not one of constant, linear, cosine, exponential"),
        ("exponential", 0.0, 1.0, {}, "positive ends"),
        ("exponential", 1.0, -1.0, {}, "positive ends"),
        ("linear", 0.0, 1.0, {"warmup": 0.7, "hold": 0.4}, "sum to at most 1"),
        ("linear", 0.0, 1.0, {"warmup": -0.1}, "sum to at most 1"),
        ("linear", 0.0, 1.0, {"hold": -0.1}, "sum to at most 1"),
    ],
)
def test_impossible_curves_are_refused(
    kind: str, start: float, end: float, shares: dict[str, float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        curve_value(kind, start, end, 3, 10, **shares)
