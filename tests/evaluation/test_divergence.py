"""Divergence kernels against sums written out, and intervals against what is known of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from globe.evaluation.bootstrap import FEWEST, ratio_interval
from globe.evaluation.divergence import divergence
from globe.numerics.divergence import kl_divergence, top1_agreement


def draw(t: int, v: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(t, v, generator=torch.Generator().manual_seed(seed))


def slow_kl(original: Tensor, compressed: Tensor) -> list[float]:
    found = []
    for p_row, q_row in zip(original.double(), compressed.double(), strict=True):
        p = [math.exp(x) / sum(math.exp(y) for y in p_row.tolist()) for x in p_row.tolist()]
        q = [math.exp(x) / sum(math.exp(y) for y in q_row.tolist()) for x in q_row.tolist()]
        found.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return found


def test_kl_is_the_sum_over_the_vocabulary_from_the_original_to_the_model() -> None:
    original, compressed = draw(5, 11, 0), draw(5, 11, 1)
    found = kl_divergence(original, compressed)
    torch.testing.assert_close(found, torch.tensor(slow_kl(original, compressed)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, kl_divergence(compressed, original), rtol=0.05)


def test_kl_of_two_known_coins() -> None:
    fair, biased = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert float(kl_divergence(fair, biased)) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert float(kl_divergence(biased, fair)) == pytest.approx(math.log(2) - 0.5623351446188083, rel=1e-6)


@given(seed=st.integers(0, 10_000), shift=st.floats(-50, 50), step=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]))
def test_kl_is_never_negative_and_blind_to_a_shift_of_the_logits(
    seed: int, shift: float, step: float
) -> None:
    original = draw(3, 7, seed)
    moved = original + step * draw(3, 7, seed + 1, scale=1.0)
    found = kl_divergence(original, moved)
    assert bool((found >= 0).all())
    torch.testing.assert_close(kl_divergence(original, moved + shift), found, rtol=1e-3, atol=1e-5)
    if step == 0:
        assert int(torch.count_nonzero(kl_divergence(original, original.clone()))) == 0
    if step == 1:
        assert bool((found > 1e-4).any())


def test_small_divergences_keep_their_digits() -> None:
    """KL is of second order in the step: at 1e-3 the plain sum of p log(p / q) in float32 has lost most of them."""
    original = draw(4, 4096, 5)
    moved = original + 1e-3 * draw(4, 4096, 6, scale=1.0)
    p, q = (torch.log_softmax(one.double(), dim=1) for one in (original, moved))
    exact = (p.exp() * (p - q)).sum(dim=1)
    assert float(exact.max()) < 1e-6
    torch.testing.assert_close(kl_divergence(original, moved).double(), exact, rtol=0.02, atol=0)


def test_entries_that_can_not_come_up() -> None:
    masked = torch.tensor([[1.0, 2.0, -math.inf]])
    open_ = torch.tensor([[1.0, 2.0, 0.5]])
    expected = math.log(float(open_.exp().sum()) / float(masked.exp().sum()))
    assert float(kl_divergence(masked, open_)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_divergence(masked, masked)) == 0
    assert float(kl_divergence(open_, masked)) == math.inf


def test_agreement_counts_the_first_of_equals() -> None:
    original = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    model = torch.tensor([[1.0, 5.0, 4.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert top1_agreement(original, model).tolist() == [1.0, 1.0, 0.0]


def test_means_are_over_tokens_and_not_over_windows() -> None:
    kl, agree, tokens = (
        torch.tensor(one, dtype=torch.float64) for one in ([3.0, 1.0], [1.0, 3.0], [1.0, 3.0])
    )
    found = divergence(kl, agree, tokens, seed=0)
    assert (found.kl, found.top1_agreement) == (1.0, 1.0)
    assert found.kl_interval is None


def test_intervals_need_enough_windows_and_are_seeded() -> None:
    values = draw(FEWEST, 1, 0)[:, 0].double() ** 2
    ones = torch.ones(FEWEST, dtype=torch.float64)
    assert ratio_interval(values[1:], ones[1:], seed=0) is None
    assert ratio_interval(values, ones, seed=0) == ratio_interval(values, ones, seed=0)
    assert ratio_interval(values, ones, seed=0) != ratio_interval(values, ones, seed=1)


def test_the_interval_is_as_wide_as_theory_has_it() -> None:
    """400 independent values of variance 1: +-1.96 / 20 around their mean."""
    values = draw(400, 1, 2, scale=1.0)[:, 0].double() + 5
    found = ratio_interval(2 * values, torch.full((400,), 2.0, dtype=torch.float64), seed=0)
    assert found is not None
    mean = float(values.mean())
    assert found.low < mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.2)


def test_neighbours_of_one_kind_widen_the_interval() -> None:
    """The same values in runs of eight say less than they do in random order."""
    values = draw(64, 1, 3, scale=1.0)[:, 0].double().repeat_interleave(8)
    shuffled = values[torch.randperm(512, generator=torch.Generator().manual_seed(0))]
    ones = torch.ones(512, dtype=torch.float64)
    runs, single = (ratio_interval(one, ones, seed=0) for one in (values, shuffled))
    assert runs is not None
    assert single is not None
    assert runs.high - runs.low > 1.8 * (single.high - single.low)
