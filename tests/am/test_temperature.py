"""The support: entmax against its definition by bisection, the law that steers it, the prune."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.am.temperature import next_temperature, prune, simplex_weights, support_from_logits
from globe.errors import FitError
from globe.numerics.figures import summarise_support

N, M = 9, 12
MAPS = ("entmax15", "sparsemax")


def logits(seed: int = 0, n: int = N, m: int = M, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, generator=generator, dtype=torch.float64).to(dtype)


def slow_weights(z: torch.Tensor, T: float, code_map: str) -> torch.Tensor:
    """max(z' - tau, 0)^(1 or 2) with tau found by bisection so that the weights sum to one."""
    z = z.double() / T / (2 if code_map == "entmax15" else 1)
    power = 2 if code_map == "entmax15" else 1
    low, high = z.amax(1, keepdim=True) - 1, z.amax(1, keepdim=True)
    for _ in range(100):
        tau = (low + high) / 2
        over = (z - tau).clamp_min(0).pow(power).sum(1, keepdim=True) > 1
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    return (z - low).clamp_min(0).pow(power)


@pytest.mark.parametrize("code_map", MAPS)
@pytest.mark.parametrize("T", [0.05, 0.4, 1.0, 5.0, 300.0])
def test_weights_equal_the_definition(code_map: str, T: float) -> None:
    z = logits()
    torch.testing.assert_close(
        simplex_weights(z, T, code_map=code_map), slow_weights(z, T, code_map), rtol=0, atol=1e-10
    )


@given(st.integers(0, 2**31), st.floats(-12, 12), st.sampled_from(MAPS), st.sampled_from([0, 1, 2]))
def test_support_is_never_empty_and_holds_the_largest(
    seed: int, exponent: float, code_map: str, which: int
) -> None:
    dtype = (torch.float64, torch.float32, torch.bfloat16)[which]
    z = logits(seed, dtype=dtype) * 100
    support = support_from_logits(z, 10**exponent, code_map=code_map)
    assert bool(support.gather(1, z.argmax(1, keepdim=True)).all())


@given(st.integers(0, 2**31), st.sampled_from(MAPS), st.floats(0.02, 3), st.floats(1.1, 5))
def test_support_grows_with_temperature(seed: int, code_map: str, T: float, factor: float) -> None:
    z = logits(seed)
    colder = support_from_logits(z, T, code_map=code_map)
    hotter = support_from_logits(z, T * factor, code_map=code_map)
    assert bool((hotter | ~colder).all())


@pytest.mark.parametrize("code_map", MAPS)
def test_extreme_temperatures(code_map: str) -> None:
    z = logits(dtype=torch.float32) + 1e3
    cold = simplex_weights(z, 1e-30, code_map=code_map)
    assert torch.equal(cold, torch.nn.functional.one_hot(z.argmax(1), M).float())
    hot = simplex_weights(z, 1e30, code_map=code_map)
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / M))


@pytest.mark.parametrize("code_map", MAPS)
def test_equal_logits_share_equally_and_excluded_ones_get_nothing(code_map: str) -> None:
    z = torch.zeros(2, M)
    z[:, 3:] = -math.inf
    weights = simplex_weights(z, 0.01, code_map=code_map)
    torch.testing.assert_close(weights[:, :3], torch.full((2, 3), 1 / 3))
    assert bool((weights[:, 3:] == 0).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    z = logits()
    z[4, 2] = bad
    with pytest.raises(FitError, match="no longer finite"):
        support_from_logits(z, 1.0, code_map="entmax15")
    with pytest.raises(FitError, match="no longer finite"):
        simplex_weights(torch.full((1, M), -math.inf), 1.0, code_map="sparsemax")


def test_unknown_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"codes.map='softmax'"):
        simplex_weights(logits(), 1.0, code_map="softmax")


def test_law_by_hand() -> None:
    assert next_temperature(2.0, 5.0, 4.0, eta=0.1) == pytest.approx(2 * math.exp(-0.025))
    assert next_temperature(2.0, 3.0, 4.0, eta=0.1) == pytest.approx(2 * math.exp(0.025))
    assert next_temperature(2.0, 4.0, 4.0, eta=0.1) == 2.0
    assert next_temperature(2.0, 60.0, 4.0, eta=0.05) == pytest.approx(2 * math.exp(-0.1))
    assert next_temperature(2.0, 1.0, 100.0, eta=0.5, clamp=0.2) == pytest.approx(2 * math.exp(0.2))


def test_law_stays_within_its_bounds() -> None:
    T = 1.0
    for _ in range(1000):
        T = next_temperature(T, 12.0, 1.0, eta=0.1)
    assert T == 1e-6
    for _ in range(1000):
        T = next_temperature(T, 1.0, 12.0, eta=0.5)
    assert T == 1e6


@pytest.mark.parametrize("values", [(0.0, 1.0, 0.1), (1.0, 0.0, 0.1), (1.0, 1.0, 0.0), (math.nan, 1.0, 0.1)])
def test_law_refuses_what_is_not_positive(values: tuple[float, float, float]) -> None:
    T, target, eta = values
    with pytest.raises(ValueError, match="must all be positive"):
        next_temperature(T, 3.0, target, eta=eta)


@pytest.mark.parametrize("code_map", MAPS)
@pytest.mark.parametrize("target", [2, 7])
@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("eta", [0.02, 0.1])
def test_closed_loop_settles_at_the_target_from_either_side(
    code_map: str, target: int, start: float, eta: float
) -> None:
    z = logits(n=31)
    T = start
    medians = []
    for _ in range(round(15 / eta)):
        median = summarise_support(support_from_logits(z, T, code_map=code_map).double()).median
        medians.append(median)
        T = next_temperature(T, median, float(target), eta=eta)
    assert medians[0] != target
    assert set(medians[-30:]) == {float(target)}


@given(st.integers(0, 2**31), st.floats(0, 0.999))
def test_prune_keeps_the_largest_and_all_above_the_share(seed: int, eps: float) -> None:
    codes = logits(seed).clamp_min(0)
    codes[2] = 0
    pruned = prune(codes, eps)
    for before, after in zip(codes.tolist(), pruned.tolist(), strict=True):
        assert after == [x if x >= eps * max(before) else 0.0 for x in before]
        assert max(after) == max(before)


def test_prune_keeps_a_code_that_is_exactly_the_share() -> None:
    codes = torch.tensor([[1.0, 0.5, 0.25]])
    assert prune(codes, 0.5).tolist() == [[1.0, 0.5, 0.0]]


def test_prune_refuses_a_share_that_would_take_everything() -> None:
    with pytest.raises(ValueError, match="from 0 to below 1"):
        prune(torch.ones(2, 3), 1.0)
