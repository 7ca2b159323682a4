"""First atoms and first codes: planted groups, optimality of group bases, no empty group, one seed one
draw.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from globe.am.seeding import _without_empty, first_codes, group_basis, kmeans_groups, seed_bank
from globe.am.warm_start import right_basis, truncated_svd

N, P, D, R, M = 10, 5, 7, 2, 3
METHODS = ("random", "kmeans", "group_svd", "aligned", "aligned_svd")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def planted_groups(
    noise: float, seed: int = 0, d: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts of M groups, each reading one of M random subspaces, in a random order of the groups."""
    subspaces = torch.stack([right_basis(gaussian(d, d, seed=seed + 10 * j), R) for j in range(M)])
    truth = torch.arange(N)[torch.randperm(N, generator=seeded(seed))] % M
    X = gaussian(N, P, R, seed=seed + 1) @ subspaces[truth] + noise * gaussian(N, P, d, seed=seed + 2)
    return X, truth, subspaces


def same_partition(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first[:, None] == first, second[:, None] == second)


@pytest.mark.parametrize("seeding", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_dtype_orthonormal_atoms_and_equal_seeds(seeding: str, dtype: torch.dtype) -> None:
    X = gaussian(N, P, D).to(dtype)
    bank, groups = seed_bank(X, M, R, seeding=seeding, generator=seeded(4))
    assert bank.shape == (M, R, D)
    assert bank.dtype == dtype
    torch.testing.assert_close(bank @ bank.mT, torch.eye(R, dtype=dtype).expand(M, R, R), rtol=0, atol=1e-5)
    again, same = seed_bank(X, M, R, seeding=seeding, generator=seeded(4))
    assert torch.equal(bank, again)
    assert torch.equal(groups, same)
    others = [seed_bank(X, M, R, seeding=seeding, generator=seeded(seed))[1] for seed in range(5, 12)]
    assert any(not torch.equal(groups, other) for other in others)


@pytest.mark.parametrize("seeding", METHODS)
@pytest.mark.parametrize("m", range(1, N + 1))
def test_no_group_is_empty_for_any_m(seeding: str, m: int) -> None:
    _, groups = seed_bank(gaussian(N, P, D), m, R, seeding=seeding, generator=seeded(m))
    sizes = torch.bincount(groups, minlength=m)
    assert sizes.shape == (m,)
    assert int(sizes.min()) >= 1
    if seeding != "kmeans":
        assert int(sizes.max()) - int(sizes.min()) <= 1


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from(METHODS), st.integers(1, N), st.integers(0, 3))
def test_degenerate_experts_leave_atoms_orthonormal_and_groups_full(
    seed: int, seeding: str, m: int, kind: int
) -> None:
    X = gaussian(N, P, D, seed=seed)
    if kind == 1:
        X = X[:1].expand(N, P, D)
    elif kind == 2:
        X = torch.zeros(N, P, D, dtype=torch.float64)
    elif kind == 3:
        X = X * (torch.arange(N) < 2)[:, None, None]
    bank, groups = seed_bank(X, m, R, seeding=seeding, generator=seeded(seed))
    torch.testing.assert_close(bank @ bank.mT, torch.eye(R).double().expand(m, R, R), rtol=0, atol=1e-10)
    assert int(torch.bincount(groups, minlength=m).min()) >= 1


@pytest.mark.parametrize("m", [0, N + 1])
def test_impossible_number_of_atoms_is_refused(m: int) -> None:
    with pytest.raises(ValueError, match=rf"bank.m={m} is not between 1 and the {N} experts"):
        seed_bank(gaussian(N, P, D), m, R, seeding="random", generator=seeded())


def test_impossible_width_and_unknown_method_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"bank.r={P + 1} is not between 1 and {P}"):
        seed_bank(gaussian(N, P, D), M, P + 1, seeding="random", generator=seeded())
    with pytest.raises(
        ValueError, match=r"init.seeding='pca' is not one of random, kmeans, group_svd, aligned, aligned_svd"
    ):
        seed_bank(gaussian(N, P, D), M, R, seeding="pca", generator=seeded())


# bases of groups


@pytest.mark.parametrize("members", [1, 2, 4], ids=["fewer rows than columns", "more", "many more"])
def test_group_basis_is_the_svd_of_the_stack(members: int) -> None:
    X = gaussian(N, P, D)
    chosen = torch.zeros(N, dtype=torch.bool)
    chosen[torch.tensor([7, 2, 9, 4])[:members]] = True
    expected = torch.linalg.svd(X[chosen].reshape(-1, D), full_matrices=False).Vh[:R]
    basis = group_basis(X, chosen, R)
    torch.testing.assert_close(basis.mT @ basis, expected.mT @ expected, rtol=0, atol=1e-12)


def test_group_svd_is_lossless_on_planted_groups_only_with_the_right_groups() -> None:
    X, truth, subspaces = planted_groups(noise=0.0)
    for group in range(M):
        basis = group_basis(X, truth == group, R)
        torch.testing.assert_close(
            basis.mT @ basis, subspaces[group].mT @ subspaces[group], rtol=0, atol=1e-10
        )


def test_random_and_aligned_pick_one_expert_of_each_group() -> None:
    X = gaussian(N, P, D)
    _, bases = truncated_svd(X, R)
    projector = lambda basis: basis.mT @ basis
    for seeding in ("random", "aligned"):
        bank, groups = seed_bank(X, M, R, seeding=seeding, generator=seeded(2))
        for group in range(M):
            distance = (projector(bank[group]) - projector(bases)).norm(dim=(1, 2))
            pick = int(distance.argmin())
            assert float(distance[pick]) < 1e-10
            assert int(groups[pick]) == group


def test_aligned_atoms_agree_better_with_each_other_than_plain_ones() -> None:
    """Experts that read almost the same subspace, each in a gauge of its own: alignment makes them nearly
    equal.
    """
    shared = right_basis(gaussian(16, 16), 4)
    turns = torch.linalg.qr(gaussian(N, 4, 4, seed=1)).Q
    X = gaussian(N, P, 4, seed=2) @ turns @ shared + 0.01 * gaussian(N, P, 16, seed=3)
    apart = {}
    for seeding in ("random", "aligned", "group_svd", "aligned_svd"):
        bank, _ = seed_bank(X, M, 4, seeding=seeding, generator=seeded(1))
        apart[seeding] = max(float((one - two).norm()) for one, two in itertools.combinations(bank, 2))
    assert max(apart["aligned"], apart["aligned_svd"]) < 0.2
    assert min(apart["random"], apart["group_svd"]) > 1.0


@pytest.mark.parametrize("seeding", METHODS)
def test_a_warm_start_that_is_there_is_used_and_changes_nothing(seeding: str) -> None:
    X = gaussian(N, P, D)
    plain = seed_bank(X, M, R, seeding=seeding, generator=seeded(3))
    helped = seed_bank(X, M, R, seeding=seeding, generator=seeded(3), warm_start=truncated_svd(X, R))
    torch.testing.assert_close(plain[0], helped[0], rtol=0, atol=1e-12)
    assert torch.equal(plain[1], helped[1])


# k-means


@pytest.mark.parametrize("seed", range(8))
def test_kmeans_finds_planted_groups(seed: int) -> None:
    X, truth, subspaces = planted_groups(noise=0.02, seed=seed)
    found = [kmeans_groups(X, M, generator=seeded(start)) for start in range(6)]
    # Lloyd's method may stop in a local minimum from one start, hardly from all of six
    assert any(same_partition(groups, truth) for groups in found)
    bank, groups = next(
        (bank, groups)
        for start in range(30)
        for bank, groups in [seed_bank(X, M, R, seeding="kmeans", generator=seeded(start))]
        if same_partition(groups, truth)
    )
    for group in range(M):
        kind = int(truth[groups == group][0])
        close = torch.linalg.matrix_norm(bank[group] @ subspaces[kind].mT) ** 2
        assert float(close) > R - 0.05


@pytest.mark.parametrize("m", [3, 4, N])
@pytest.mark.parametrize("kinds", [1, 2])
def test_kmeans_fills_more_groups_than_there_are_different_experts(m: int, kinds: int) -> None:
    X = gaussian(kinds, P, D)[torch.arange(N) % kinds]
    for seed in range(5):
        groups = kmeans_groups(X, m, generator=seeded(seed))
        assert int(torch.bincount(groups, minlength=m).min()) >= 1


def slow_kmeans_step(X: torch.Tensor, groups: torch.Tensor, m: int) -> torch.Tensor:
    """One Lloyd step on the d x d matrices themselves."""
    C = torch.stack([x.mT @ x / (x.mT @ x).norm() for x in X])
    centres = torch.stack([C[groups == group].mean(dim=0) for group in range(m)])
    return (C[:, None] - centres).pow(2).sum(dim=(2, 3)).argmin(dim=1)


@given(st.integers(0, 2**31))
def test_kmeans_ends_at_a_fixed_point_of_the_explicit_method(seed: int) -> None:
    """Lines in a plane: no groups stand apart, so the first assignment is hardly ever the last."""
    X = gaussian(31, 1, 2, seed=seed)
    groups = kmeans_groups(X, M, generator=seeded(seed))
    assert torch.equal(slow_kmeans_step(X, groups, M), groups)


@given(st.integers(0, 2**31))
def test_kmeans_does_not_see_rotations_of_the_rows_or_the_size_of_an_expert(seed: int) -> None:
    X = gaussian(N, P, D, seed=seed)
    turns = torch.linalg.qr(gaussian(N, P, P, seed=seed + 1)).Q
    sizes = torch.logspace(-2, 2, N, dtype=torch.float64)[:, None, None]
    plain = kmeans_groups(X, M, generator=seeded(seed))
    assert torch.equal(plain, kmeans_groups(sizes * (turns @ X), M, generator=seeded(seed)))


@given(st.integers(0, 2**31), st.integers(1, N))
def test_an_empty_group_takes_the_farthest_expert_that_can_be_spared(seed: int, m: int) -> None:
    distance = gaussian(N, m, seed=seed).abs()
    groups = torch.randint(max(1, m // 2), (N,), generator=seeded(seed))
    empty = [group for group in range(m) if group not in groups.tolist()]
    filled = _without_empty(groups, distance)
    assert int(torch.bincount(filled, minlength=m).min()) >= 1
    moved = (filled != groups).nonzero()[:, 0]
    assert len(moved) == len(empty)
    if empty:
        own = distance.gather(1, groups[:, None])[:, 0]
        could = [i for i in range(N) if int((groups == groups[i]).sum()) > 1]
        assert int(filled[max(could, key=lambda i: float(own[i]))]) == empty[0]


# first codes


def start(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    X = gaussian(N, P, D, seed=seed)
    bank, groups = seed_bank(X, M, R, seeding="group_svd", generator=seeded(seed))
    return bank, groups, truncated_svd(X, R).bases


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0.01, 10))
def test_mixed_codes_are_points_of_the_simplex_with_their_own_share(
    seed: int, one_hot: float, concentration: float
) -> None:
    bank, groups, _ = start()
    codes = first_codes(
        "mixed", bank, groups, generator=seeded(seed), one_hot=one_hot, concentration=concentration
    )
    assert bool((codes >= 0).all())
    torch.testing.assert_close(codes.sum(1), torch.ones(N).double(), rtol=1e-12, atol=0)
    assert bool((codes.gather(1, groups[:, None]) >= one_hot - 1e-12).all())


def test_mixed_codes_have_the_moments_of_the_dirichlet() -> None:
    c, m, n = 0.3, 5, 4000
    bank = torch.zeros(m, R, D)
    groups = torch.arange(n) % m
    codes = first_codes("mixed", bank, groups, generator=seeded(), one_hot=0.0, concentration=c)
    assert codes.dtype == torch.float32
    variance = (1 / m) * (1 - 1 / m) / (m * c + 1)
    torch.testing.assert_close(codes.mean(0), torch.full((m,), 1 / m), rtol=0, atol=0.02)
    torch.testing.assert_close(codes.var(0), torch.full((m,), variance), rtol=0.1, atol=0)


def test_mixed_codes_follow_the_generator() -> None:
    bank, groups, _ = start()
    draw = lambda seed: first_codes("mixed", bank, groups, generator=seeded(seed))
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    one = seeded(1)
    assert not torch.equal(
        first_codes("mixed", bank, groups, generator=one), first_codes("mixed", bank, groups, generator=one)
    )


@pytest.mark.parametrize("kind", ["nnls", "simplex"])
def test_fitted_codes_find_planted_ones_whatever_the_gauge(kind: str) -> None:
    bank, groups, _ = start()
    planted = torch.rand(N, M, generator=seeded(), dtype=torch.float64).pow(3)
    planted /= planted.sum(dim=1, keepdim=True)
    planted = 0.4 * planted + 0.6 * torch.nn.functional.one_hot(groups, M)
    bases = torch.einsum("nm,mrd->nrd", planted, bank)
    codes = first_codes(kind, bank, groups, generator=seeded(), bases=bases)
    torch.testing.assert_close(codes, planted, rtol=0, atol=0.05)
    turned = torch.linalg.qr(gaussian(N, R, R)).Q @ bases
    again = first_codes(kind, bank, groups, generator=seeded(), bases=turned)
    torch.testing.assert_close(again, codes, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["nnls", "simplex"])
@pytest.mark.parametrize("m", [1, M, N])
def test_fitted_codes_leave_no_expert_without(kind: str, m: int) -> None:
    X = gaussian(N, P, D)
    bank, groups = seed_bank(X, m, R, seeding="random", generator=seeded())
    codes = first_codes(kind, bank, groups, generator=seeded(), bases=truncated_svd(X, R).bases)
    assert codes.shape == (N, m)
    assert bool((codes >= 0).all())
    assert bool((codes.amax(dim=1) > 0).all())
    if kind == "simplex":
        torch.testing.assert_close(codes.sum(1), torch.ones(N).double(), rtol=1e-12, atol=0)


def test_misuse_is_refused() -> None:
    bank, groups, _ = start()
    with pytest.raises(ValueError, match=r"init.codes=nnls fits the bases"):
        first_codes("nnls", bank, groups, generator=seeded())
    with pytest.raises(ValueError, match=r"init.codes='dense' is not one of"):
        first_codes("dense", bank, groups, generator=seeded())
