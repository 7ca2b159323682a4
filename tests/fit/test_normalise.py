"""The z-score: its constants against slow formulas, its exact inverse, and the scale folded into the
factors.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.errors import CheckpointError
from globe.fit.normalise import denormalise, fold_scale, join, normalise

N, P, D, R = 4, 5, 7, 3
CENTRES = ("none", "scalar", "expert_mean")
SCALES = ("none", "family", "expert", "row")


def experts(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.01, 0.3, 2.0, 50.0], dtype=torch.float64)[:, None, None]
    return (0.02 + spread * torch.randn(N, P, D, generator=generator, dtype=torch.float64)).to(dtype)


def slow_mean(W: torch.Tensor, centre: str) -> list[list[list[float]]]:
    """The mean that is taken off each entry, from plain Python sums."""
    rows = W.tolist()
    if centre == "none":
        value = [[0.0] * D for _ in range(P)]
    elif centre == "scalar":
        total = math.fsum(x for expert in rows for row in expert for x in row) / (N * P * D)
        value = [[total] * D for _ in range(P)]
    else:
        value = [[math.fsum(rows[i][a][b] for i in range(N)) / N for b in range(D)] for a in range(P)]
    return [value] * N


@pytest.mark.parametrize("centre", CENTRES)
@pytest.mark.parametrize("scale", SCALES)
def test_constants_equal_the_slow_formula(centre: str, scale: str) -> None:
    W = experts()
    mean = torch.tensor(slow_mean(W, centre), dtype=torch.float64)
    left = W - mean
    expected = {
        "none": torch.ones(N, P),
        "family": left.pow(2).mean().sqrt().expand(N, P),
        "expert": left.pow(2).mean(dim=(1, 2)).sqrt()[:, None].expand(N, P),
        "row": left.pow(2).mean(dim=2).sqrt(),
    }[scale].to(torch.float64)
    got = normalise(W, centre=centre, scale=scale)
    assert (got.mean is None) == (centre == "none")
    assert (got.scale is None) == (scale == "none")
    if got.mean is not None:
        assert got.mean.shape == (() if centre == "scalar" else (P, D))
        torch.testing.assert_close(got.mean.expand(P, D), mean[0], rtol=1e-13, atol=1e-15)
    if got.scale is not None:
        assert got.scale.shape == {"family": (), "expert": (N,), "row": (N, P)}[scale]
    torch.testing.assert_close(got.experts, left / expected[:, :, None], rtol=1e-12, atol=1e-13)


def test_scalar_and_family_are_the_usual_z_score() -> None:
    got = normalise(experts(), centre="scalar", scale="family").experts
    assert abs(float(got.mean())) < 1e-14
    assert float(got.var(correction=0)) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_sources_are_widened_and_their_moments_taken_in_float64(dtype: torch.dtype) -> None:
    W = experts(dtype=dtype)
    got = normalise(W, centre="scalar", scale="family")
    assert got.experts.dtype == torch.float32
    assert got.mean is not None
    assert got.scale is not None
    wide = W.double()
    assert float(got.mean) == pytest.approx(float(wide.mean()), rel=1e-7)
    assert float(got.scale) == pytest.approx(float(wide.std(correction=0)), rel=1e-7)
    assert normalise(W, centre="none", scale="none", dtype=torch.float64).experts.dtype == torch.float64


def test_moments_do_not_lose_a_small_spread_on_a_large_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    W = (1000 + 0.5 * torch.randn(N, P, D, generator=generator)).float()
    got = normalise(W, centre="scalar", scale="family")
    assert got.scale is not None
    # a float32 sum of squares would be off in the first digit here
    assert float(got.scale) == pytest.approx(float(W.double().std(correction=0)), rel=1e-4)


@given(
    st.integers(0, 2**31),
    st.sampled_from(CENTRES),
    st.sampled_from(SCALES),
    st.floats(-3, 3),
    st.floats(-6, 6),
)
def test_round_trip(seed: int, centre: str, scale: str, shift: float, magnitude: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = 10**magnitude * (shift + torch.randn(N, P, D, generator=generator, dtype=torch.float64))
    got = normalise(W, centre=centre, scale=scale)
    back = denormalise(got.experts, got.mean, got.scale)
    torch.testing.assert_close(back, W, rtol=0, atol=1e-14 * float(W.abs().max()))


@given(st.integers(0, 2**31), st.sampled_from(CENTRES), st.sampled_from(SCALES))
def test_fold_back_is_exact_through_the_factors(seed: int, centre: str, scale: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    W, A, M = 3 * draw(N, P, D) + 1, draw(N, P, R), draw(N, R, D)
    got = normalise(W, centre=centre, scale=scale)
    folded = fold_scale(A, got.scale) @ M
    expected = denormalise(A @ M, got.mean, got.scale)
    torch.testing.assert_close(
        folded if got.mean is None else folded + got.mean, expected, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["family", "expert", "row"])
@pytest.mark.parametrize("centre", CENTRES)
def test_zeros_get_scale_one(centre: str, scale: str, dtype: torch.dtype) -> None:
    got = normalise(torch.zeros(N, P, D, dtype=dtype), centre=centre, scale=scale)
    assert got.scale is not None
    assert bool((got.scale == 1).all())
    assert bool((got.experts == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -1e5, 1e-20])
@pytest.mark.parametrize("scale", ["family", "expert", "row"])
def test_what_centring_leaves_of_constant_experts_is_not_blown_up(
    scale: str, value: float, dtype: torch.dtype
) -> None:
    got = normalise(torch.full((N, P, D), value, dtype=dtype), centre="scalar", scale=scale)
    assert got.scale is not None
    assert bool((got.scale == 1).all())
    assert float(got.experts.abs().max()) <= 1e-6 * abs(value)


def test_equal_experts_under_the_mean_expert() -> None:
    one = experts()[1].float()
    got = normalise(one.expand(N, P, D), centre="expert_mean", scale="row")
    assert got.scale is not None
    assert bool((got.scale == 1).all())


def test_a_constant_row_and_a_dead_row_among_live_ones() -> None:
    W = experts()
    W[1, 2] = 5.0
    W[3, 4] = 0.0
    got = normalise(W, centre="none", scale="row")
    assert got.scale is not None
    assert float(got.scale[1, 2]) == pytest.approx(5.0)
    assert float(got.scale[3, 4]) == 1.0
    live = torch.ones(N, P, dtype=torch.bool)
    live[3, 4] = False
    torch.testing.assert_close(
        got.experts.pow(2).mean(dim=2)[live], torch.ones(N * P - 1, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unusable_numbers_are_refused_with_the_expert_named(bad: float) -> None:
    W = experts()
    W[2, 1, 3] = bad
    with pytest.raises(CheckpointError, match="expert 2 of the 4"):
        normalise(W, centre="scalar", scale="family")


@pytest.mark.parametrize(("centre", "scale"), [("mean", "family"), ("scalar", "std")])
def test_unknown_options_are_refused(centre: str, scale: str) -> None:
    with pytest.raises(ValueError, match="not a known pair"):
        normalise(experts(), centre=centre, scale=scale)


def test_a_scale_that_does_not_fit_is_refused() -> None:
    A = torch.ones(N, P, R)
    for shape in ((P,), (P, N), (N, P, R)):
        with pytest.raises(ValueError, match="does not fit"):
            fold_scale(A, torch.ones(shape))


@pytest.mark.parametrize("centre", CENTRES)
@pytest.mark.parametrize("scale", SCALES)
def test_joined_members_fold_back_each_with_its_own_constants(centre: str, scale: str) -> None:
    first, second = experts(0), 7 + 3 * experts(1)[:3]
    parts = [normalise(W, centre=centre, scale=scale) for W in (first, second)]
    joined = join(parts)
    assert joined.starts == (0, N, N + 3)
    back = fold_scale(joined.experts, joined.scale)
    if joined.mean is not None:
        assert joined.mean.shape == ((2,) if centre == "scalar" else (2, P, D))
        back[:N] += joined.mean[0]
        back[N:] += joined.mean[1]
    torch.testing.assert_close(back, torch.cat([first, second]), rtol=1e-12, atol=1e-11)


def test_joining_one_member_copies_nothing_and_mixed_options_are_refused() -> None:
    one = normalise(experts(), centre="scalar", scale="family")
    assert join([one]).experts.data_ptr() == one.experts.data_ptr()
    with pytest.raises(ValueError, match="different options"):
        join([one, normalise(experts(), centre="none", scale="family")])
