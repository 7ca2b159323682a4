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

from globe.bank import compose
from globe.bank.compose import BasisCache, mixed_bases, rebuild
from globe.bank.file import BankArtefact, Member
from globe.numerics.activation import phi

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


# the cache


@given(
    st.sampled_from([0, 1, 3, N, N + 5]),
    st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True), max_size=20),
)
def test_cache_keeps_what_is_needed_and_else_the_most_recently_used(
    capacity: int, calls: list[list[int]]
) -> None:
    """Beside a list that is searched and rebuilt at every call."""
    cache, kept = BasisCache(capacity), []
    for needed in calls:
        found = cache.take(needed)
        assert set(found) == set(needed) & set(kept)
        assert all(float(basis[0, 0]) == expert for expert, basis in found.items())
        kept = [one for one in kept if one not in needed] + [one for one in needed if one in kept]
        absent = [expert for expert in needed if expert not in found]
        while len(kept) + len(absent) > capacity and any(one not in needed for one in kept):
            kept.remove(next(one for one in kept if one not in needed))
        room = cache.make_room(len(absent), needed)
        assert room == min(len(absent), max(0, capacity - len(kept)))
        cache.keep({expert: torch.full((R, D), float(expert)) for expert in absent[:room]})
        kept += absent[:room]
        assert cache.experts == tuple(kept)
        assert len(kept) <= capacity
        assert cache.nbytes == len(kept) * R * D * 4
    cache.clear()
    assert (cache.experts, cache.nbytes) == ((), 0)


def test_a_cache_that_is_made_smaller_takes_nothing_more_and_shrinks_when_asked() -> None:
    cache = BasisCache(3)
    cache.keep({expert: torch.zeros(R, D, dtype=torch.bfloat16) for expert in (4, 0, 6)})
    assert cache.nbytes == 3 * R * D * 2
    cache.capacity = 1
    assert cache.make_room(2, needed=[0, 6]) == 0
    cache.keep({})
    assert cache.experts == (0, 6)
