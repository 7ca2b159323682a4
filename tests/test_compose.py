"""From factors to matrices: the mixture against its sum, dense experts with their mean, the cache and its
bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe import compose
from globe.am.activation import phi
from globe.artefact import BankArtefact, Member
from globe.compose import BasisCache, mixed_bases, rebuild
from globe.errors import ConfigError

N, P, D, M, R, K = 7, 5, 9, 4, 3, 2
MEMBERS = (Member(1, "up", 0, 3, (0, 1, 2)), Member(2, "up", 3, N, (0, 1, 2, 3)))


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def codes_like(density: float, seed: int = 1) -> torch.Tensor:
    codes = gaussian(N, M, seed=seed).abs()
    return codes * (torch.rand(N, M, generator=torch.Generator().manual_seed(seed)) < density)


def artefact(
    dtype: torch.dtype = torch.float64,
    *,
    low_rank: bool = False,
    mean: torch.Tensor | None = None,
    density: float = 1.0,
    lam: float = 0.6,
) -> BankArtefact:
    atoms = {"bank": gaussian(M, R, D, dtype=dtype)}
    if low_rank:
        atoms = {
            "atoms_left": gaussian(M, R, K, seed=4, dtype=dtype),
            "atoms_right": gaussian(M, K, D, seed=5, dtype=dtype),
        }
    return BankArtefact(
        members=MEMBERS,
        codes=codes_like(density).to(dtype),
        adapters=gaussian(N, P, R, seed=2, dtype=dtype),
        activation="silu",
        lam=lam,
        mean=mean,
        **atoms,
    )


def slow_atoms(one: BankArtefact) -> torch.Tensor:
    if one.bank is not None:
        return one.bank.double()
    assert one.atoms_left is not None
    assert one.atoms_right is not None
    return torch.einsum("mrk,mkd->mrd", one.atoms_left.double(), one.atoms_right.double())


def slow_basis(one: BankArtefact, row: int) -> torch.Tensor:
    """phi of the sum, atom by atom, in float64."""
    total = torch.zeros(R, D, dtype=torch.float64)
    for j, atom in enumerate(slow_atoms(one)):
        total += float(one.codes[row, j]) * atom
    return phi(total, lam=one.lam, activation=one.activation)


def slow_expert(one: BankArtefact, row: int) -> torch.Tensor:
    expert = one.adapters[row].double() @ slow_basis(one, row)
    if one.mean is None:
        return expert
    member = next(j for j, member in enumerate(one.members) if row in range(member.start, member.stop))
    return expert + one.mean[member].double()


# mixing


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("rows", [[2], [5, 0], list(range(N))])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_mixed_bases_equal_the_sum(low_rank: bool, density: float, rows: list[int], lam: float) -> None:
    one = artefact(low_rank=low_rank, density=density, lam=lam)
    got = compose.bases_of(one, rows)
    torch.testing.assert_close(got, torch.stack([slow_basis(one, row) for row in rows]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_factors_are_mixed_in_float32_and_rounded_once(dtype: torch.dtype, low_rank: bool) -> None:
    one = artefact(dtype, low_rank=low_rank)
    exact = torch.stack([slow_basis(one, row) for row in range(N)])
    wide = compose.bases_of(one, slice(None))
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-5)
    narrow = compose.bases_of(one, slice(None), dtype=dtype)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, wide.to(dtype))


def test_a_bank_is_widened_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    one = artefact(torch.bfloat16)
    whole = compose.bases_of(one, slice(None))
    monkeypatch.setattr(compose, "_WIDENED", 5 * M)
    torch.testing.assert_close(compose.bases_of(one, slice(None)), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("low_rank", [False, True])
def test_sparse_codes_read_only_the_atoms_they_use(low_rank: bool) -> None:
    one = artefact(low_rank=low_rank)
    codes = one.codes.clone()
    codes[:, [0, 3]] = 0
    one = replace(one, codes=codes)
    expected = compose.bases_of(one, slice(None))
    for atoms in (one.bank, one.atoms_left, one.atoms_right):
        if atoms is not None:
            atoms[[0, 3]] = float("nan")
    assert torch.equal(compose.bases_of(one, slice(None)), expected)


@given(st.integers(0, 2**31), st.floats(0, 3), st.floats(0, 3))
def test_mixing_is_linear_in_the_codes_before_the_activation(seed: int, a: float, b: float) -> None:
    bank, first, second = gaussian(M, R, D), codes_like(1.0, seed), codes_like(0.5, seed + 1)
    mix = lambda codes: mixed_bases(codes, bank, lam=0.0, activation="silu")
    torch.testing.assert_close(
        mix(a * first + b * second), a * mix(first) + b * mix(second), rtol=0, atol=1e-11
    )


def test_gradients_reach_codes_and_atoms() -> None:
    one = artefact(torch.bfloat16)
    assert one.bank is not None
    codes, bank = one.codes.clone().requires_grad_(), one.bank.clone().requires_grad_()
    mixed_bases(codes, bank, lam=1.0, activation="silu").square().sum().backward()
    assert codes.grad is not None
    assert bank.grad is not None
    assert float(codes.grad.abs().min()) > 0
    assert float(bank.grad.abs().sum()) > 0


def test_exactly_one_kind_of_atoms() -> None:
    bank, left, right = gaussian(M, R, D), gaussian(M, R, K), gaussian(M, K, D)
    codes = codes_like(1.0)
    for atoms in ({}, {"atoms_left": left}, {"bank": bank, "atoms_left": left, "atoms_right": right}):
        with pytest.raises(ValueError, match="give either dense atoms"):
            mixed_bases(codes, lam=0.0, activation="silu", **atoms)


# dense experts

MEANS: dict[str, Callable[[], torch.Tensor | None]] = {
    "none": lambda: None,
    "scalar": lambda: torch.tensor([0.5, -3.0], dtype=torch.float64),
    "expert": lambda: gaussian(2, P, D, seed=9),
}


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("rows", [None, [4], [6, 2, 3], list(range(2, 6))])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_rebuild_equals_the_formula_with_the_mean_of_the_right_member(
    mean: str, low_rank: bool, rows: list[int] | None, chunk: int
) -> None:
    one = artefact(low_rank=low_rank, mean=MEANS[mean]())
    got = rebuild(one, rows, chunk=chunk)
    expected = torch.stack([slow_expert(one, row) for row in (range(N) if rows is None else rows)])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_rebuild_takes_the_dtype_of_the_adapters_or_the_one_asked_for() -> None:
    one = artefact(torch.bfloat16, mean=torch.tensor([0.5, -3.0]))
    exact = torch.stack([slow_expert(one, row) for row in range(N)])
    plain, wide = rebuild(one), rebuild(one, dtype=torch.float32)
    assert plain.dtype == torch.bfloat16
    assert torch.equal(plain, wide.bfloat16())
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("row", [-1, N])
def test_rows_that_are_not_there(row: int) -> None:
    with pytest.raises(IndexError, match="not all among the bank's 7 experts"):
        rebuild(artefact(), [0, row])
    with pytest.raises(IndexError, match="is not one of the bank's 7 experts"):
        BasisCache(artefact()).get(row)


# the cache


@given(
    st.sampled_from([0, 1, 3, N, N + 5, "all"]), st.lists(st.integers(0, N - 1), max_size=40), st.booleans()
)
def test_cache_is_least_recently_used_and_never_wrong(
    capacity: int | str, calls: list[int], low_rank: bool
) -> None:
    one = artefact(low_rank=low_rank)
    cache = BasisCache(one, capacity, dtype=torch.float64)
    room = N if capacity == "all" else min(int(capacity), N)
    kept: list[int] = []
    hits = 0
    for row in calls:
        hits += row in kept
        kept = ([other for other in kept if other != row] + [row])[-room:] if room else []
        torch.testing.assert_close(cache.get(row), slow_basis(one, row), rtol=0, atol=1e-12)
        assert cache.rows == tuple(kept)
        assert cache.cache_bytes == len(kept) * R * D * 8
    assert (cache.hits, cache.misses) == (hits, len(calls) - hits)
    assert cache.full_cache_bytes == room * R * D * 8
    cache.clear()
    assert cache.cache_bytes == 0


def test_a_hit_is_the_same_tensor_and_a_recomposition_has_the_same_bits() -> None:
    one = artefact(torch.float32)
    kept, forgetful = BasisCache(one, 2), BasisCache(one, 0)
    assert kept.get(3) is kept.get(3)
    assert forgetful.get(3) is not forgetful.get(3)
    assert torch.equal(kept.get(3), forgetful.get(3))


def test_bytes_are_exact() -> None:
    one = artefact(torch.bfloat16, mean=gaussian(2, P, D, dtype=torch.bfloat16))
    one = replace(one, scale=torch.ones(N))
    cache = BasisCache(one, 3, dtype=torch.float16)
    for row in range(N):
        cache.get(row)
    assert cache.get(0).dtype == torch.float16
    assert cache.cache_bytes == cache.full_cache_bytes == 3 * R * D * 2
    assert cache.factor_bytes == 2 * (N * P * R + M * R * D + N * M + 2 * P * D)
    assert cache.dense_bytes == 2 * N * P * D
    low = BasisCache(artefact(torch.float32, low_rank=True), "all", dtype=torch.bfloat16)
    assert low.factor_bytes == 4 * (N * P * R + M * K * (R + D) + N * M)
    assert low.full_cache_bytes == 2 * N * R * D


def test_the_cache_does_not_track_gradients() -> None:
    one = artefact()
    assert one.bank is not None
    cache = BasisCache(replace(one, bank=one.bank.clone().requires_grad_()), "all")
    assert not cache.get(1).requires_grad


@pytest.mark.parametrize("capacity", [-1, "some", ""])
def test_impossible_capacities_are_refused(capacity: int | str) -> None:
    with pytest.raises(ConfigError, match=r"S_cache=.* is not possible"):
        BasisCache(artefact(), capacity)
