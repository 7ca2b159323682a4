"""Rounding to a few bits, packing, and error feedback, each beside its slow definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from globe.bank.feedback import metric_errors, round_with_feedback
from globe.bank.packing import Packed, pack, read_packed, unpack
from globe.bank.rotation import hadamard, rotation
from globe.bank.rounding import NOISE, STEP, Grid, group_scale, nearest_level, round_nearest, row_width
from globe.errors import ArtefactError, FitError

N, O, K = 3, 5, 11


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric(seed: int = 1, k: int = K) -> Tensor:
    """Gram matrices far from the identity."""
    M = normal(N, k, k + 3, seed=seed) * torch.logspace(0, 0.7, k, dtype=torch.float64)[:, None]
    M = M + 6 * normal(N, 1, k + 3, seed=seed + 50)
    return M @ M.mT


def slow_nearest(row: Tensor, bits: int) -> Tensor:
    """One group with the unsearched scale, level by level."""
    top = 2**bits - 1
    scale = (2 * row.abs().max() / top).bfloat16().double()
    levels = [(q - top / 2) * float(scale) for q in range(top + 1)]
    return torch.tensor([min(levels, key=lambda level: abs(level - float(w))) for w in row])


@pytest.mark.parametrize("bits", range(1, 9))
def test_nearest_rounding_takes_the_nearest_level(bits: int) -> None:
    W = normal(N, O, K, seed=bits) + 0.3
    found = round_nearest(W, Grid.of(bits, K, 4), searched=False)
    assert int(found.codes.max()) < 2**bits
    for row, values in zip(W.flatten(0, 1), found.values().flatten(0, 1), strict=True):
        for part in (slice(0, 4), slice(4, 8), slice(8, 11)):
            wanted = slow_nearest(row[part], bits)
            # as near to the weights as the nearest level; ties may go either way
            torch.testing.assert_close(
                (values[part] - row[part]).abs(), (wanted - row[part]).abs(), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_searched_scales_are_never_worse_and_near_the_best(bits: int) -> None:
    W = normal(7, 24, seed=bits)
    plain = round_nearest(W, Grid.of(bits, 24, 24), searched=False).values() - W
    found = round_nearest(W, Grid.of(bits, 24, 24)).values() - W
    assert bool((found.square().sum(1) <= plain.square().sum(1) * (1 + 1e-6)).all())
    # an exhaustive search over the scale of each row
    factors = torch.linspace(0.05, 1.1, 2000, dtype=torch.float64)
    whole = 2 * W.abs().amax(1) / (2**bits - 1)
    top = Grid.of(bits, 24, 24).top(W)
    best = torch.full_like(whole, torch.inf)
    for factor in factors:
        levels = nearest_level(W, whole * factor, top).double() - top / 2
        best = torch.minimum(best, (W - levels * (whole * factor)[:, None]).square().sum(1))
    assert bool((found.square().sum(1) <= best * (1.12 if bits < 8 else 1.6)).all())


@pytest.mark.parametrize("bits", range(9))
def test_noise_and_step_are_those_of_normal_numbers(bits: int) -> None:
    x = torch.linspace(-9, 9, 1_800_001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5 * 1e-5
    top = Grid.of(bits, 1, 1).top(x)

    def error(step: float) -> float:
        levels = nearest_level(x[:, None], x.new_tensor(step).expand(len(x)), top)[:, 0].double()
        return float((weight * (x - (levels - top / 2) * step).square()).sum())

    assert error(STEP[bits]) == pytest.approx(NOISE[bits], rel=2e-3)
    assert bits == 0 or error(STEP[bits]) < min(error(STEP[bits] * 0.95), error(STEP[bits] * 1.05))


def test_zeros_and_constants_are_reproduced() -> None:
    W, grid = torch.zeros(2, 3, 5), Grid.of(3, 5, 2)
    assert torch.equal(round_nearest(W, grid).values(), W)
    fed = round_with_feedback(W, torch.eye(5).expand(2, 5, 5), grid)
    assert torch.equal(fed.values(), W)
    ones = torch.full((2, 3, 5), 1.5)
    torch.testing.assert_close(round_nearest(ones, Grid.of(2, 5, 5)).values(), ones)


def test_columns_of_more_bits_reach_farther_in_steps_of_one_size() -> None:
    bits = (6, 4, 4, 2, 2, 1, 0)
    W = normal(50, 7, seed=3) / torch.tensor([STEP[b] if b else 3.0 for b in bits], dtype=torch.float64)
    found = round_nearest(W, Grid.of(bits, 7, 7))
    assert bool((found.values()[:, 6] == 0).all())
    for j, b in enumerate(bits):
        assert int(found.codes[:, j].max()) <= 2**b - 1
    inside = (found.codes[:, :1] > 0) & (found.codes[:, :1] < 63)
    off = (W - found.values())[:, :1].abs() <= found.scale[:, :1].double() / 2 * (1 + 1e-5)
    assert bool(off[inside].all())
    single = torch.cat(
        [round_nearest(W[:, j : j + 1], Grid.of(b, 1, 1)).values() for j, b in enumerate(bits)], 1
    )
    assert single.shape == W.shape


def test_bits_that_do_not_fit_are_refused() -> None:
    for bits in (-1, 9, (2, 3), (2,) * 10 + (9,)):
        with pytest.raises(ValueError, match="do not fit 11 columns in groups of 4"):
            Grid.of(bits, 11, 4)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 2**31))
def test_packed_integers_come_back(bits: list[int], group: int, seed: int) -> None:
    grid = Grid.of(bits, len(bits), group)
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(2, 3, len(bits), generator=generator) * (grid.top(torch.ones(1)) + 1)).to(torch.uint8)
    words = pack(codes, grid)
    assert words.shape == (2, 3, row_width(grid.bits))
    assert torch.equal(unpack(words, grid), codes)


def test_packed_stream_is_least_significant_bit_first() -> None:
    codes = torch.tensor([[1, 6, 3, 5, 255]], dtype=torch.uint8)
    stream = sum(int(q) << at for q, at in zip(codes[0], (0, 3, 6, 9, 12), strict=True))
    assert bytes(pack(codes, Grid.of((3, 3, 3, 3, 8), 5, 2))[0].tolist()) == stream.to_bytes(3, "little")


@pytest.mark.parametrize("bits", [2, 3, 5, 8, (4,) * 4 + (2,) * 4 + (7,) * 3])
def test_packed_and_unpacked_agree_bit_for_bit(bits: int | tuple[int, ...]) -> None:
    rounded = round_nearest(normal(N, O, K).float(), Grid.of(bits, K, 4))
    columns = torch.linspace(0.5, 2, K).bfloat16()
    packed = Packed.of(rounded, columns)
    assert torch.equal(packed.rounded().values(), rounded.values())
    assert torch.equal(packed.values(), rounded.values() * columns.float())
    assert torch.equal(packed.values(torch.bfloat16), (rounded.values() * columns.float()).bfloat16())
    assert torch.equal(packed[1:].values(), packed.values()[1:])
    padding = N * O * (8 * row_width(packed.grid.bits) - sum(packed.grid.bits))
    assert 8 * packed.nbytes == rounded.nbits + 16 * K + padding
    again = read_packed(packed.tensors(), packed.layout(), "here")
    assert again.grid == packed.grid
    assert torch.equal(again.values(), packed.values())


def slow_feedback(w: Tensor, H: Tensor, grid: Grid, *, ridge: float) -> Tensor:
    """Optimal brain quantisation of one row in a fixed order: eliminate a column from the inverse after each."""
    k = len(w)
    mean = H.diagonal().mean()
    inverse = torch.linalg.inv(H / mean + ridge * torch.eye(k, dtype=H.dtype))
    w, values = w.clone(), torch.empty_like(w)
    for j in range(k):
        top = 2 ** grid.bits[j] - 1
        if j % grid.group == 0:
            part = slice(j, j + grid.group)
            scale = group_scale(w[part], grid.top(w)[part], searched=True)
        offset = top / 2
        level = min(max(round(float(w[j] / scale) + offset), 0), top) if float(scale) > 0 else offset
        values[j] = (level - offset) * scale
        w -= (w[j] - values[j]) / inverse[j, j] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return values


@pytest.mark.parametrize("bits", [2, 3, 4, (5,) * 4 + (3,) * 4 + (1,) * 3])
def test_feedback_equals_the_slow_definition(bits: int | tuple[int, ...]) -> None:
    W, H, grid = normal(N, O, K, seed=4), metric(), Grid.of(bits, K, 4)
    found = round_with_feedback(W, H, grid, sweeps=0).values()
    nearest = round_nearest(W, grid).values().double()
    fed = 0
    for i in range(N):
        for row in range(O):
            wanted = slow_feedback(W[i, row], H[i], grid, ridge=1e-2)
            errors = [float((v - W[i, row]) @ H[i] @ (v - W[i, row])) for v in (nearest[i, row], wanted)]
            better = wanted if errors[1] < errors[0] else nearest[i, row]
            fed += errors[1] < errors[0]
            torch.testing.assert_close(found[i, row].double(), better, rtol=1e-6, atol=1e-9)
    assert fed > N * O / 3


@pytest.mark.parametrize("sweeps", [0, 1, 3])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_feedback_is_never_worse_than_nearest_rounding_in_the_metric(bits: int, sweeps: int) -> None:
    W, H, grid = normal(N, O, K, seed=bits), metric(seed=bits + 1), Grid.of(bits, K, 4)
    nearest = metric_errors(W, round_nearest(W, grid).values(), H)
    found = metric_errors(W, round_with_feedback(W, H, grid, sweeps=sweeps).values(), H)
    assert bool((found <= nearest * (1 + 1e-6)).all())
    assert float(found.sum()) < (0.9 if bits == 8 else 0.6) * float(nearest.sum())


def test_sweeps_descend() -> None:
    W, H = normal(N, O, K, seed=6), metric(seed=7)
    errors = [
        metric_errors(W, round_with_feedback(W, H, Grid.of(2, K, 4), sweeps=s).values(), H) for s in range(4)
    ]
    for before, after in pairwise(errors):
        assert bool((after <= before * (1 + 1e-6)).all())
    assert float(errors[3].sum()) < 0.97 * float(errors[0].sum())


def test_swept_rows_are_at_a_coordinate_minimum() -> None:
    W, H = normal(1, 2, 6, seed=8), metric(seed=9, k=6)[:1]
    found = round_with_feedback(W, H, Grid.of(3, 6, 3), sweeps=12)
    least = metric_errors(W, found.values(), H)
    for j in range(6):
        for change in (-1, 1):
            codes = found.codes.clone().int()
            codes[..., j] = (codes[..., j] + change).clamp(0, 7)
            other = metric_errors(W, found._replace(codes=codes.to(torch.uint8)).values(), H)
            assert bool((other >= least * (1 - 1e-6)).all())


def test_a_metric_that_is_not_finite_is_refused() -> None:
    H = metric()
    H[1, 0, 0] = torch.nan
    with pytest.raises(FitError, match="metric of rounding is not finite"):
        round_with_feedback(normal(N, O, K), H, Grid.of(3, K, 4))


def test_directions_without_weight_are_left_at_the_nearest_level() -> None:
    H = torch.zeros(N, K, K, dtype=torch.float64)
    W = normal(N, O, K)
    found = round_with_feedback(W, H, Grid.of(3, K, 4))
    assert torch.equal(found.values(), round_nearest(W, Grid.of(3, K, 4)).values())


def test_hostile_packed_factors_are_refused_by_sentences() -> None:
    rounded = round_nearest(normal(N, O, K).float(), Grid.of(3, K, 4))
    packed = Packed.of(rounded, torch.ones(K))
    tensors, layout = packed.tensors(), packed.layout()
    assert layout == {"bits": [[3, 11]], "group": 4, "turned": None}
    read_packed(tensors, layout, "it")
    nan = packed.scale.clone()
    nan[0, 0, 0] = torch.nan
    empty = {name: part[:0] for name, part in tensors.items()}
    cases: list[tuple[dict[str, Tensor], object, str]] = [
        (tensors, None, "no layout"),
        (tensors, layout | {"group": 0}, "a group of 0"),
        (tensors, layout | {"group": "4"}, "a group of '4'"),
        (tensors, layout | {"group": True}, "a group of True"),
        (tensors, layout | {"group": 6}, "is due"),
        (tensors, layout | {"bits": 3}, "no list of bits"),
        (tensors, layout | {"bits": []}, "no list of bits"),
        (tensors, layout | {"bits": [3, 11]}, "a run of columns 3"),
        (tensors, layout | {"bits": [[3, 12]]}, "is due"),
        (tensors, layout | {"bits": [[9, 11]]}, "0 to 8"),
        (tensors, layout | {"bits": [[3, -11]]}, "0 to 8"),
        (tensors, layout | {"bits": [[3, 1 << 60]]}, "0 to 8"),
        (tensors, layout | {"bits": [[3, 1 << 20]] * 3}, "3145728 columns"),
        ({"words": packed.words}, layout, "no words, or no scales"),
        (tensors | {"more": packed.words}, layout, "an unknown part 'more'"),
        (tensors | {"scale": packed.scale.float()}, layout, "torch.float32"),
        (tensors | {"scale": nan}, layout, "NaN"),
        (tensors | {"scale": -packed.scale}, layout, "negative scales"),
        (tensors | {"zero": packed.words}, layout, "an unknown part 'zero'"),
        (empty, layout, "no rows"),
        (tensors, layout | {"turned": -1}, "rows turned by -1"),
        (tensors, layout | {"turned": "7"}, "rows turned by '7'"),
    ]
    for parts, described, problem in cases:
        with pytest.raises(ArtefactError, match=problem) as caught:
            read_packed(parts, described, "it")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("it can't be used: ")


@pytest.mark.parametrize("size", [1, 2, 7, 12, 16, 32, 176])
def test_rotations_are_orthogonal_exact_and_drawn_by_their_seed(size: int) -> None:
    R = rotation(size, 5)
    torch.testing.assert_close(R @ R.T, torch.eye(size), rtol=1e-6, atol=1e-6)
    assert torch.equal(R, rotation(size, 5))
    assert size == 1 or not torch.equal(R, rotation(size, 6))
    assert torch.equal(R.bfloat16().float(), R)


def test_rotation_of_a_power_of_two_spreads_an_entry_over_all() -> None:
    assert torch.equal(rotation(16, 3).abs(), torch.full((16, 16), 0.25))
    with pytest.raises(ValueError, match="12 is not a power of two"):
        hadamard(12)


def test_turned_rows_come_back() -> None:
    W, R = normal(N, 6, K).float(), rotation(6, 9)
    rounded = round_nearest(R @ W, Grid.of(8, K, K))
    packed = Packed.of(rounded, turned=9)
    torch.testing.assert_close(packed.values(), R.T @ rounded.values())
    assert float((packed.values() - W).norm() / W.norm()) < 0.01
    assert torch.equal(packed[1:].values(), packed.values()[1:])
    assert torch.equal(read_packed(packed.tensors(), packed.layout(), "it").values(), packed.values())
