"""One budget for many banks: as good as trying everything, never too much, never worse than equal shares."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import globe.sizes.allocation
from globe.sizes.allocation import Curve, allocate

CURVES = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def curves_of(pairs: list[list[tuple[int, int]]]) -> list[Curve]:
    return [
        Curve(tuple(size for size, _ in options), tuple(float(loss) for _, loss in options))
        for options in pairs
    ]


def taken(curves: list[Curve], chosen: tuple[int, ...]) -> tuple[float, int]:
    parts = [(curve.losses[at], curve.sizes[at]) for curve, at in zip(curves, chosen, strict=True)]
    return sum(loss for loss, _ in parts), sum(size for _, size in parts)


@given(CURVES, st.integers(0, 40))
def test_it_equals_brute_force(pairs: list[list[tuple[int, int]]], total: int) -> None:
    curves = curves_of(pairs)
    every = itertools.product(*(range(len(curve.sizes)) for curve in curves))
    possible = [taken(curves, choice) for choice in every if taken(curves, choice)[1] <= total]
    chosen = allocate(curves, total)
    if not possible:
        assert chosen is None
        return
    assert chosen is not None
    assert len(chosen) == len(curves)
    assert taken(curves, chosen) == min(possible)


def test_it_never_does_worse_than_equal_shares_nor_takes_more() -> None:
    shares = [share / 20 for share in range(2, 21)]
    numbers = [16 * 44 * 64, 12 * 40 * 72, 60 * 88 * 256] * 16
    curves = [
        Curve(
            tuple(int(share * count) for share in shares),
            tuple((1 + at % 7) ** 2 * (1 - share) ** 2.5 for share in shares),
        )
        for at, count in enumerate(numbers)
    ]
    for share in (0.3, 0.5, 0.8):
        total = int(share * sum(numbers))
        chosen = allocate(curves, total)
        assert chosen is not None
        loss, size = taken(curves, chosen)
        assert size <= total
        uniform = shares.index(share)
        assert loss < sum(curve.losses[uniform] for curve in curves)
        assert loss <= taken(curves, tuple([uniform] * len(curves)))[0]
        # of banks of one size, those that matter more get at least as much
        first = [curves[at].sizes[chosen[at]] for at in range(0, 21, 3)]
        weights = [(1 + at % 7) ** 2 for at in range(0, 21, 3)]
        ranked = [size for _, size in sorted(zip(weights, first, strict=True))]
        assert ranked[0] < ranked[-1] or share > 0.7


def test_a_known_choice_is_never_bettered_by_a_worse_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where choices had to be thinned out, the one that is known to be possible still counts."""
    monkeypatch.setattr(globe.sizes.allocation, "_MOST", 2)
    curves = [
        Curve((1, 2, 4, 7), (9.0, 5.0, 3.0, 0.0)),
        Curve((1, 3, 5), (8.0, 2.0, 0.5)),
        Curve((2, 3), (4.0, 1.0)),
    ]
    every = itertools.product(range(4), range(3), range(2))
    best = min((taken(curves, one), one) for one in every if taken(curves, one)[1] <= 10)
    thin = allocate(curves, 10)
    assert thin is not None
    assert taken(curves, thin)[1] <= 10
    known = allocate(curves, 10, best[1])
    assert known is not None
    assert taken(curves, known) == best[0]


def test_what_is_far_more_sensitive_is_left_alone() -> None:
    curves = [Curve((10, 50, 100), (1e3, 30.0, 0.0)), *[Curve((10, 50, 100), (0.5, 0.2, 0.0))] * 3]
    assert allocate(curves, 200) == (2, 0, 0, 1)


def test_equal_losses_take_the_smaller_size() -> None:
    assert allocate([Curve((7, 3, 5), (1.0, 1.0, 1.0))], 10) == (1,)
    assert allocate([Curve((4,), (0.0,))], 3) is None
    assert allocate([], 0) == ()


@pytest.mark.parametrize("banks", [200])
def test_many_banks_of_one_shape_are_quick(banks: int) -> None:
    """Sums of multiples of a few numbers coincide, so that there are few different ones."""
    curves = [
        Curve(tuple(range(2, 21)), tuple((at + 1) / size for size in range(2, 21))) for at in range(banks)
    ]
    chosen = allocate(curves, 10 * banks)
    assert chosen is not None
    assert taken(curves, chosen)[1] <= 10 * banks
