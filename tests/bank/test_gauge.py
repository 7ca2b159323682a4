"""Bits shared out over columns, column factors, and the balanced gauge."""

from __future__ import annotations

import itertools

import pytest
import torch

from globe.bank.gauge import allocate_bits, balanced_gauge, column_factors
from globe.bank.rounding import NOISE, STEP


def noise(importance: list[float], bits: tuple[int, ...]) -> float:
    return sum(value * NOISE[b] for value, b in zip(importance, bits, strict=True))


@pytest.mark.parametrize("total", [0, 1, 5, 8, 11])
def test_shared_bits_are_the_best_of_all(total: int) -> None:
    importance = [9.0, 0.4, 3.0, 0.01]
    found = allocate_bits(importance, total, most=5)
    every = (bits for bits in itertools.product(range(6), repeat=4) if sum(bits) == total)
    assert sum(found) == total
    assert noise(importance, found) == pytest.approx(
        min(noise(importance, bits) for bits in every), rel=1e-12
    )


def test_no_column_gets_more_than_the_most() -> None:
    assert allocate_bits([1.0, 1e-9], 100) == (8, 8)
    assert allocate_bits([0.0, 1.0], 3) == (0, 3)
    assert allocate_bits([], 3) == ()


def test_column_factors_make_columns_fit_their_bits() -> None:
    bits = (6, 4, 3, 2)
    reach = torch.tensor([1 / STEP[b] for b in bits], dtype=torch.float64)
    weights = torch.full((4,), 2.0, dtype=torch.float64)
    # columns as water-filling leaves them: equal weights, sizes in the proportion of what the bits reach
    factors = column_factors(reach.square(), weights, bits)
    torch.testing.assert_close(factors, torch.ones(4, dtype=torch.float64), rtol=5e-3, atol=0)
    # a column ten times as large whose row is ten times as small is the same column
    scaled = column_factors(
        reach.square() * torch.tensor([100, 1, 1, 1]), weights / torch.tensor([100, 1, 1, 1]), bits
    )
    torch.testing.assert_close(
        scaled[0] / scaled[1], torch.tensor(10.0, dtype=torch.float64), rtol=1e-2, atol=0
    )
    assert torch.equal(scaled, scaled.bfloat16().double())


def test_column_factors_of_nothing_are_one() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(column_factors(zeros, zeros, (2, 2, 2)), torch.ones(3, dtype=torch.float64))


def test_balanced_gauge_is_diagonal_balanced_and_changes_no_product() -> None:
    generator = torch.Generator().manual_seed(0)
    n, p, r, d = 3, 7, 4, 9
    A, M = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in ((p, r), (r, d)))
    M = M * torch.tensor([5.0, 1.0, 0.2, 1.0], dtype=torch.float64)[:, None]
    K, G = (M @ M.mT).sum(0), (A.mT @ A).sum(0)
    T, inverse = balanced_gauge(K, G)
    torch.testing.assert_close(T @ inverse, torch.eye(r, dtype=torch.float64))
    torch.testing.assert_close((A @ inverse) @ (T @ M), A @ M)
    rows, columns = T @ K @ T.mT, inverse.mT @ G @ inverse
    torch.testing.assert_close(rows, columns, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(rows, torch.diag(rows.diagonal()), rtol=1e-8, atol=1e-8 * float(rows.max()))
    assert bool((rows.diagonal().diff() <= 0).all())


def test_balanced_gauge_of_dependent_rows_is_finite() -> None:
    M = torch.ones(3, 5, dtype=torch.float64)
    T, inverse = balanced_gauge(M @ M.mT, torch.eye(3, dtype=torch.float64))
    assert bool(torch.isfinite(T).all())
    torch.testing.assert_close(T @ inverse, torch.eye(3, dtype=torch.float64), rtol=1e-4, atol=1e-4)
