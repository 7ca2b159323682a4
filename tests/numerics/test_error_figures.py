"""Every figure against a slow formula, and its value in the degenerate cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.numerics import figures as metrics

N, P, D, R, M = 6, 4, 9, 3, 5


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def some_codes(seed: int = 0, n: int = N) -> torch.Tensor:
    codes = gaussian(n, M, seed=seed).clamp_min(0)
    codes[torch.arange(n), torch.arange(n) % M] += 0.1
    return codes


# errors


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_errors_and_what_follows_from_them(chunk: int) -> None:
    X, A, B = 3 + gaussian(N, P, D), gaussian(N, P, R, seed=1), gaussian(N, R, D, seed=2)
    errors, norms = metrics.squared_errors(X, A, B, chunk=chunk), metrics.squared_norms(X)
    x, y = X.numpy(), np.stack([a @ b for a, b in zip(A.numpy(), B.numpy(), strict=True)])
    np.testing.assert_allclose(errors, ((x - y) ** 2).sum(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(norms, (x**2).sum(axis=(1, 2)), rtol=1e-12)
    assert metrics.relfrob(errors, norms) == pytest.approx(
        np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12
    )
    assert metrics.mse(errors, P * D) == pytest.approx(((x - y) ** 2).mean(), rel=1e-12)
    seen = metrics.spread(X)
    assert metrics.global_mean(seen) == pytest.approx(x.mean(), rel=1e-12)
    assert metrics.explained_variance(errors, seen) == pytest.approx(
        1 - ((x - y) ** 2).sum() / ((x - x.mean()) ** 2).sum(), rel=1e-12
    )
    each = [1 - ((a - b) ** 2).sum() / ((a - a.mean()) ** 2).sum() for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(metrics.explained_variance_per_expert(errors, seen), each, rtol=1e-12)


def test_small_errors_do_not_cancel() -> None:
    """|X|^2 - 2 <X, Xhat> + |Xhat|^2 in float32 would give zero or worse here."""
    A, B = gaussian(N, P, R).float(), gaussian(N, R, D, seed=1).float()
    X = A @ B
    X[:, 0, 0] += 1e-4
    added = (X[:, 0, 0] - (A @ B)[:, 0, 0]).double().square()
    assert metrics.squared_errors(X, A, B).tolist() == pytest.approx(added.tolist(), rel=2e-2)
    assert metrics.squared_errors(X, A, B).dtype == torch.float64


def test_no_temporary_of_the_size_of_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    plain = torch.baddbmm

    def watched(*args: torch.Tensor, **kwargs: float) -> torch.Tensor:
        nonlocal largest
        result = plain(*args, **kwargs)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch, "baddbmm", watched)
    metrics.squared_errors(gaussian(N, P, D), gaussian(N, P, R), gaussian(N, R, D), chunk=2)
    assert largest == 2 * P * D


def test_zero_experts() -> None:
    zero = torch.zeros(N, P, D)
    A, B = torch.zeros(N, P, R), torch.zeros(N, R, D)
    errors, norms = metrics.squared_errors(zero, A, B), metrics.squared_norms(zero)
    assert metrics.relfrob(errors, norms) == 0.0
    assert metrics.relfrob(errors + 1, norms) == math.inf
    assert metrics.explained_variance(errors, metrics.spread(zero)) == 1.0
    assert metrics.explained_variance(errors + 1, metrics.spread(zero)) == -math.inf
    assert metrics.energy_of_rank(zero, R) == 0.0
    assert metrics.effective_rank(metrics.singular_values(zero)).tolist() == [0] * N


def test_energy_captured_is_that_of_the_singular_values() -> None:
    X = gaussian(N, P, D)
    S = np.linalg.svd(X.numpy(), compute_uv=False)
    assert metrics.energy_of_rank(X, R) == pytest.approx((S[:, :R] ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("shape", [(P, D), (D, P)])
def test_singular_values(shape: tuple[int, int]) -> None:
    X = gaussian(N, *shape)
    np.testing.assert_allclose(
        metrics.singular_values(X), np.linalg.svd(X.numpy(), compute_uv=False), rtol=1e-10
    )


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.05, 1))
def test_effective_rank_is_the_fewest_that_hold_the_share(values: list[float], share: float) -> None:
    ordered = sorted(values, reverse=True)
    rank = int(metrics.effective_rank(torch.tensor([ordered], dtype=torch.float64), share)[0])
    total = sum(v * v for v in ordered)
    assert sum(v * v for v in ordered[:rank]) >= share * total * (1 - 1e-9)
    assert sum(v * v for v in ordered[: rank - 1]) < share * total


def test_effective_rank_by_hand() -> None:
    # squares 90 5 5: one holds 0.90, two hold exactly 0.95
    values = torch.tensor([[90.0, 5.0, 5.0], [100.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64).sqrt()
    assert metrics.effective_rank(values).tolist() == [2, 1, 3]
    assert metrics.effective_rank(values, 0.9).tolist() == [1, 1, 3]
    # five of nine equal ones hold 5/9 of the energy exactly, and a rounding less in float64
    assert metrics.effective_rank(torch.full((1, 9), 0.1, dtype=torch.float64), 5 / 9).tolist() == [5]


# codes


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_support_summary_equals_the_plain_counts(seed: int, n: int) -> None:
    codes = some_codes(seed, n)
    counts = [sum(1 for x in row if x > 0) for row in codes.tolist()]
    assert metrics.support_sizes(codes).tolist() == counts
    got = metrics.summarise_support(codes)
    assert got.mean == pytest.approx(np.mean(counts))
    assert got.median == np.median(counts)
    assert (got.min, got.max) == (min(counts), max(counts))
    assert got.histogram == tuple(counts.count(k) for k in range(M + 1))


def test_entropy_and_effective_support() -> None:
    codes = some_codes()
    for i, row in enumerate(codes.numpy()):
        q = row / row.sum()
        q = q[q > 0]
        assert float(metrics.entropy(codes)[i]) == pytest.approx(-(q * np.log(q)).sum(), rel=1e-12)
        assert float(metrics.effective_support(codes)[i]) == pytest.approx(1 / (q**2).sum(), rel=1e-12)
    even = torch.tensor([[2.0, 2.0, 0.0, 2.0], [0.0, 7.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert metrics.entropy(even).tolist() == pytest.approx([math.log(3), 0.0, 0.0])
    assert metrics.effective_support(even).tolist() == pytest.approx([3.0, 1.0, 0.0])


def test_zeros_usage_and_prune() -> None:
    codes = torch.tensor([[0.5, 0.0, 0.1], [0.0, 0.0, 2.0]])
    after = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 2.0]])
    assert metrics.zero_share(codes) == 0.5
    assert metrics.atom_usage(codes).tolist() == [1, 0, 2]
    assert metrics.pruned_share(codes, after) == pytest.approx(1 / 3)
    assert metrics.pruned_share(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0


@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_jaccard_equals_sets(seed: int, other: int) -> None:
    first, second = gaussian(N, M, seed=seed).clamp_min(0), gaussian(N, M, seed=other).clamp_min(0)
    shares = []
    for one, two in zip(first, second, strict=True):
        S, T = set(one.nonzero()[:, 0].tolist()), set(two.nonzero()[:, 0].tolist())
        shares.append(len(S & T) / len(S | T) if S | T else 1.0)
    assert metrics.jaccard(first, second) == pytest.approx(np.mean(shares))
    assert metrics.jaccard(first, first) == 1.0


# bank


def test_atom_norms_and_coherence() -> None:
    bank = gaussian(M, R, D)
    flat = bank.reshape(M, -1).numpy()
    np.testing.assert_allclose(metrics.atom_norms(bank), np.linalg.norm(flat, axis=1), rtol=1e-12)
    cosines = [
        abs(flat[j] @ flat[k]) / np.linalg.norm(flat[j]) / np.linalg.norm(flat[k])
        for j in range(M)
        for k in range(M)
        if j != k
    ]
    got = metrics.coherence(bank)
    assert got.mean == pytest.approx(np.mean(cosines), rel=1e-12)
    assert got.max == pytest.approx(max(cosines), rel=1e-12)


def test_coherence_in_the_extremes() -> None:
    eye = torch.eye(M).reshape(M, 1, M)
    assert metrics.coherence(eye) == (0.0, 0.0)
    assert metrics.coherence(eye[:1]) == (0.0, 0.0)
    twins = torch.stack([eye[0], -3 * eye[0], torch.zeros(1, M)])
    assert metrics.coherence(twins).max == 1.0
    assert metrics.coherence(twins).mean == pytest.approx(1 / 3)


def test_condition_number_of_the_gram_of_the_codes() -> None:
    codes = some_codes(n=2 * M)
    gram = codes.mT @ codes
    assert metrics.condition_number(codes) == pytest.approx(float(torch.linalg.cond(gram)), rel=1e-9)
    assert metrics.condition_number(torch.eye(M)) == pytest.approx(1.0)


@pytest.mark.parametrize("why", ["unused atom", "proportional atoms", "more atoms than experts", "no codes"])
def test_condition_number_is_infinite_without_full_rank(why: str) -> None:
    codes = some_codes(n=2 * M)
    if why == "unused atom":
        codes[:, 3] = 0
    elif why == "proportional atoms":
        codes[:, 3] = 0.7 * codes[:, 1]
    elif why == "more atoms than experts":
        codes = codes[: M - 1]
    else:
        codes = torch.zeros_like(codes)
    assert metrics.condition_number(codes) == math.inf
