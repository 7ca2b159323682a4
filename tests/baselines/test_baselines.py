"""Baselines: closed forms against slow references, gradients against autograd, budgets, artefacts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count, product

import baseline_runs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from globe.am.records import StopReason
from globe.bank.compose import mixed_bases
from globe.baselines import (
    BaselinePoint,
    BaselineResult,
    BaselineSizes,
    allowed_parameters,
    mobe,
    resolve_sizes,
    slbf,
)
from globe.baselines.adam import Limits, cosine_rate, minimise
from globe.baselines.gauge import gauge_fix, pivot_rows
from globe.baselines.group_svd import captured_energy, consecutive_groups, group_bases, k_subspaces
from globe.config.choices import ADAM_METHODS, Method
from globe.errors import ConfigError, FitError

N, P, D, M, R, K = 9, 6, 11, 4, 5, 2
SIZES = {
    Method.svd: {"r": 3},
    Method.shared_basis: {"r": R},
    Method.mean_svd: {"r": 3},
    Method.group_svd: {"m": M, "r": R},
    Method.mobe: {"m": M, "r": R, "weights_std": 0.05, "steps": 12},
    Method.mobe_corrected: {"m": M, "r": R, "steps": 12},
    Method.slbf: {"r": R, "atom_rank": K, "steps": 12},
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(method: Method, X: Tensor, **changes: object) -> BaselineResult:
    return baseline_runs.run(method, X, **{**SIZES[method], **changes})


def approximation(result: BaselineResult) -> Tensor:
    """The obvious reconstruction, expert by expert and atom by atom."""
    act: Callable[[Tensor], Tensor] = {
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
        "identity": lambda y: y,
    }[result.activation]
    experts, factors = [], result.factors
    for codes, A in zip(factors.codes, factors.adapters, strict=True):
        Y = torch.zeros(A.shape[1], D, dtype=A.dtype)
        for j, code in enumerate(codes):
            if factors.left is None:
                Y += code * factors.bank[j]
            else:
                Y += code * factors.left[j] @ factors.right[j]
        experts.append(A @ ((1 - result.lam) * Y + result.lam * act(Y)))
    W = torch.stack(experts)
    return W if result.mean is None else W + result.mean


def error(X: Tensor, approximation: Tensor) -> float:
    return float((X - approximation).norm() / X.norm())


@pytest.fixture
def X() -> Tensor:
    return draw(N, P, D)


# --- closed forms --------------------------------------------------------------------------------------------------


def test_svd_leaves_the_tail_of_every_spectrum(X: Tensor) -> None:
    tails = sum(float(torch.linalg.svdvals(expert)[3:].square().sum()) for expert in X)
    assert run(Method.svd, X).relfrob == pytest.approx(math.sqrt(tails) / float(X.norm()), rel=1e-10)
    assert run(Method.svd, X, r=P).relfrob < 1e-7


def test_shared_basis_leaves_the_tail_of_the_stacked_spectrum(X: Tensor) -> None:
    values = torch.linalg.svdvals(X.reshape(-1, D))
    for r in (1, R, P + 2):
        expected = float(values[r:].norm() / values.norm())
        assert run(Method.shared_basis, X, r=r).relfrob == pytest.approx(expected, rel=1e-10)
    assert run(Method.shared_basis, X, r=D).relfrob < 1e-7


def test_mean_svd_stores_the_mean_and_leaves_the_tail_of_the_differences(X: Tensor) -> None:
    X = X + 3 * draw(P, D, seed=1)
    result = run(Method.mean_svd, X)
    mean = sum(X) / N
    tails = sum(float(torch.linalg.svdvals(expert - mean)[3:].square().sum()) for expert in X)
    torch.testing.assert_close(result.mean, mean)
    assert result.relfrob == pytest.approx(math.sqrt(tails) / float(X.norm()), rel=1e-10)
    assert run(Method.mean_svd, mean.expand(N, P, D), r=1).relfrob < 1e-12


def test_group_svd_reaches_the_best_of_all_groupings_on_a_planted_problem() -> None:
    """Two row spaces in turn, so neighbours never belong together; the reference tries all 2^7 groupings."""
    n, p, d, r = 7, 3, 8, 2
    bases = torch.linalg.qr(draw(2, d, r)).Q.mT
    X = draw(n, p, r, seed=1) @ bases[torch.arange(n) % 2] + 0.05 * draw(n, p, d, seed=2)
    least = math.inf
    for groups in product((0, 1), repeat=n):
        tail = 0.0
        for j in {0, 1}:
            members = [expert for expert, group in zip(X, groups, strict=True) if group == j]
            if members:
                tail += float(torch.linalg.svdvals(torch.cat(members))[r:].square().sum())
        least = min(least, math.sqrt(tail) / float(X.norm()))
    result = baseline_runs.run("group_svd", X, m=2, r=r, generator=torch.Generator().manual_seed(0))
    assert result.relfrob == pytest.approx(least, rel=1e-9)
    assert result.factors.codes.sum(1).eq(1).all()
    assert result.factors.codes.amax(1).eq(1).all()


def test_group_svd_is_shared_basis_with_one_group_and_svd_with_as_many_as_experts(X: Tensor) -> None:
    assert run(Method.group_svd, X, m=1).relfrob == pytest.approx(
        run(Method.shared_basis, X).relfrob, rel=1e-9
    )
    assert run(Method.group_svd, X, m=N).relfrob == pytest.approx(run(Method.svd, X, r=R).relfrob, rel=1e-9)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 5))
def test_k_subspaces_never_loses_to_its_start_and_empties_no_group(seed: int, m: int) -> None:
    X = draw(8, 3, 7, seed=seed)
    start = consecutive_groups(8, m)
    B, groups = k_subspaces(X, m=m, r=2, generator=torch.Generator().manual_seed(seed))
    before = captured_energy(X, group_bases(X, start, m=m, r=2)).gather(1, start[:, None]).sum()
    after = captured_energy(X, B).gather(1, groups[:, None]).sum()
    assert float(after) >= float(before) * (1 - 1e-9)
    assert set(groups.tolist()) == set(range(m))


def test_consecutive_groups_differ_by_at_most_one() -> None:
    assert consecutive_groups(11, 4).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("method", list(SIZES))
def test_reported_error_is_that_of_the_obvious_reconstruction(method: Method, X: Tensor) -> None:
    seen: list[BaselinePoint] = []
    result = run(method, X, on_step=seen.append)
    assert tuple(seen) == result.history
    assert result.relfrob == pytest.approx(error(X, approximation(result)), rel=1e-9)
    assert result.relfrob == pytest.approx(min(point.relfrob for point in result.history), rel=1e-6)


# --- budget --------------------------------------------------------------------------------------------------------


@given(
    method=st.sampled_from(list(SIZES)),
    n=st.integers(2, 40),
    p=st.integers(2, 60),
    d=st.integers(2, 60),
    share=st.floats(0.01, 1.0),
)
def test_budget_is_never_exceeded_and_the_last_size_is_the_largest(
    method: Method, n: int, p: int, d: int, share: float
) -> None:
    limit = allowed_parameters(share, n=n, p=p, d=d)
    assert limit <= share * n * p * d
    try:
        sizes = resolve_sizes(method, n=n, p=p, d=d, budget=share)
    except ConfigError:
        banked = method in (*ADAM_METHODS, Method.group_svd)
        m = n if method in (Method.svd, Method.mean_svd, Method.slbf) else 1
        smallest = BaselineSizes(method, n, p, d, m, 1, 1)
        assert smallest.parameters > limit or (banked and n * p > 0.75 * limit)
        return
    assert sizes.parameters <= limit
    assert sizes.kept <= share
    most = {
        Method.svd: {"r": min(p, d)},
        Method.mean_svd: {"r": min(p, d)},
        Method.shared_basis: {"r": min(n * p, d)},
        Method.slbf: {"r": min(p, d), "atom_rank": min(sizes.r, d)},
    }
    for name, highest in most.get(method, {"r": min(p, d), "m": n}).items():
        value = getattr(sizes, name)
        assert 1 <= value <= highest
        if value < highest and name != "atom_rank":
            assert replace(sizes, **{name: value + 1}).parameters > limit


@pytest.mark.parametrize("method", list(SIZES))
def test_parameters_are_the_numbers_that_must_be_stored(method: Method, X: Tensor) -> None:
    """Counted from the tensors: all entries but codes without information and the identity of a fixed gauge."""
    result = run(method, X)
    factors = result.factors
    atoms = (factors.bank,) if factors.left is None else (factors.left, factors.right)
    held = [*atoms, factors.adapters, result.mean]
    count = sum(tensor.numel() for tensor in held if tensor is not None)
    if method not in (Method.svd, Method.mean_svd, Method.shared_basis):
        count += factors.codes.numel()
    if factors.left is not None:
        count -= N * K * K
        for U in factors.left:
            rows = {int((row != 0).nonzero()[0]) for row in U if (row != 0).sum() == 1 and row.sum() == 1}
            assert rows == set(range(K))
    assert result.sizes.parameters == count
    assert result.kept == count / (N * P * D)


def test_the_bank_that_they_are_compared_with_is_no_baseline() -> None:
    with pytest.raises(ConfigError, match="method=globe is what baselines are measured against"):
        resolve_sizes("globe", n=N, p=P, d=D, budget=0.5)


def test_sizes_follow_from_a_known_budget() -> None:
    """60 experts of 176 x 256 kept at what a bank of m = 15, r = 88 needs."""
    shape = {"n": 60, "p": 176, "d": 256}
    budget = 60 * 176 * 88 + 15 * 88 * 256 + 60 * 15
    sizes = {method: resolve_sizes(method, **shape, budget=budget) for method in SIZES}
    assert sizes[Method.mobe].parameters == budget
    assert {method: one.r for method, one in sizes.items()} == {
        Method.svd: 48,
        Method.shared_basis: 117,
        Method.mean_svd: 47,
        Method.group_svd: 88,
        Method.mobe: 88,
        Method.mobe_corrected: 88,
        Method.slbf: 88,
    }
    assert sizes[Method.slbf].atom_rank == 17
    assert sizes[Method.slbf].m == 60
    assert resolve_sizes("mobe", **shape, budget=0.99).r == 176, "r = p, as published, where it fits"
    assert resolve_sizes("mobe", **shape, budget=budget, m=20).r == 80
    assert resolve_sizes("slbf", **shape, budget=budget, atom_rank=20).r == 83
    assert resolve_sizes("slbf", **shape, budget=budget, r=80).atom_rank == 22


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("svd", {"budget": 0.5, "m": 3}, "leave out m"),
        ("mobe", {"budget": 0.5, "atom_rank": 2}, "leave out atom_rank"),
        ("svd", {}, "give r or budget"),
        ("mobe", {}, "give budget"),
        ("mobe", {"m": 3}, "give r or budget"),
        ("mobe", {"m": 3, "r": 7}, "from 1 to 6"),
        ("group_svd", {"m": 10, "r": 2}, "from 1 to 9"),
        ("slbf", {"r": 3, "atom_rank": 4}, "from 1 to 3"),
        ("svd", {"budget": 1.5}, "share from 0 to 1"),
        ("svd", {"budget": 0}, "share from 0 to 1"),
        ("mean_svd", {"budget": 0.2}, "more than the budget"),
        ("mobe", {"budget": 0.1}, "larger budget"),
        ("mobe", {"budget": 100, "m": 3, "r": 3}, "more than the budget of 100"),
    ],
)
def test_impossible_sizes_are_refused_with_their_remedy(method: str, changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_sizes(method, n=N, p=P, d=D, **changes)


# --- gradients and steps -------------------------------------------------------------------------------------------


def plain_loss(A: Tensor, B: Tensor, z: Tensor, X: Tensor, activation: str) -> Tensor:
    """The published formula, expert by expert."""
    act = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "identity": lambda y: y}[activation]
    total = torch.zeros((), dtype=X.dtype)
    for i in range(X.shape[0]):
        w = z[i].exp() / z[i].exp().sum()
        Y = sum(w[j] * B[j] for j in range(B.shape[0]))
        total = total + (A[i] @ act(Y) - X[i]).square().sum()
    return total / X.numel()


@pytest.mark.parametrize("activation", ["silu", "tanh", "identity"])
def test_mobe_gradient_is_that_of_autograd(activation: str, X: Tensor) -> None:
    start = mobe.SoftmaxFactors(draw(N, P, R, seed=1), draw(M, R, D, seed=2), draw(N, M, seed=3))
    objective = mobe.MobeObjective(X, start, activation=activation)
    objective.forward()
    reported = objective.relfrob()
    objective.backward()
    factors = [factor.clone().requires_grad_() for factor in start]
    loss = plain_loss(*factors, X, activation)
    loss.backward()
    for ours, reference in zip(objective.parameters, factors, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-10, atol=1e-14)
    assert reported == pytest.approx(math.sqrt(float(loss.detach()) * X.numel()) / float(X.norm()), rel=1e-12)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_slbf_gradient_is_that_of_autograd(activation: str, X: Tensor) -> None:
    start = slbf.LowRankFactors(
        draw(N, P, R, seed=1), draw(N, R, K, seed=2), draw(N, K, D, seed=3), draw(N, N)
    )
    objective = slbf.SlbfObjective(X, start, activation=activation)
    objective.forward()
    objective.backward()
    A, U, V, z = (factor.clone().requires_grad_() for factor in start)
    plain_loss(A, U @ V, z, X, activation).backward()
    for ours, reference in zip(objective.parameters, (A, U, V, z), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-10, atol=1e-14)


def test_mobe_trains_as_the_published_loop_does(X: Tensor) -> None:
    """Adam at 0.07 on the mean squared error, from the same start: eight steps of the plain loop."""
    start = mobe.published_start(X, m=M, r=R, weights_std=0.05)
    factors = [factor.clone().requires_grad_() for factor in start]
    optimiser = torch.optim.Adam(factors, lr=0.07)
    errors = []
    for _ in range(9):
        optimiser.zero_grad()
        loss = plain_loss(*factors, X, "silu")
        errors.append(math.sqrt(float(loss.detach()) * X.numel()) / float(X.norm()))
        loss.backward()
        optimiser.step()
    seen: list[float] = []
    objective = mobe.MobeObjective(X, start, activation="silu")
    limits = Limits(steps=8, on_step=lambda point: seen.append(point.relfrob), evaluate_every=1)
    minimise(objective, limits, rates=(0.07,) * 3)
    assert seen == pytest.approx(errors, rel=1e-9)


def test_slbf_trains_as_the_published_loop_does(X: Tensor) -> None:
    """AdamW, decay 0.02, two rates on PyTorch's own cosine down to 1e-4: seven steps of the plain loop."""
    A, U, V, z = (factor.clone().requires_grad_() for factor in slbf.matrix_sign_start(X, r=R, atom_rank=K))
    groups = [{"params": [A, z], "lr": 0.10}, {"params": [U, V], "lr": 0.03}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.02)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=7, eta_min=1e-4)
    for _ in range(7):
        optimiser.zero_grad()
        plain_loss(A, U @ V, z, X, "silu").backward()
        optimiser.step()
        cosine.step()
    last = math.sqrt(float(plain_loss(A, U @ V, z, X, "silu").detach()) * X.numel()) / float(X.norm())
    assert run(Method.slbf, X, steps=7).history[-1].relfrob == pytest.approx(last, rel=1e-9)


def test_cosine_goes_from_the_rate_to_the_floor_and_stays() -> None:
    rates = [cosine_rate(0.1, floor=1e-4, fraction=share) for share in (0.0, 0.5, 1.0, 1.2)]
    assert rates == pytest.approx([0.1, (0.1 + 1e-4) / 2, 1e-4, 1e-4])
    assert Limits(steps=10, seconds=4.0).fraction(5, 3.0) == 0.75


# --- starts --------------------------------------------------------------------------------------------------------


def test_published_start_is_the_unscaled_svd_with_one_hot_logits(X: Tensor) -> None:
    std = 0.05
    A, B, z = mobe.published_start(X, m=3, r=R, weights_std=std)
    for j in range(3):
        U, S, Vt = torch.linalg.svd(std * X[3 * j : 3 * j + 3].reshape(-1, D), full_matrices=False)
        stacked = U[:, :R] @ torch.diag(S[:R]) @ Vt[:R]
        torch.testing.assert_close((A[3 * j : 3 * j + 3] @ B[j]).reshape(-1, D), stacked)
        torch.testing.assert_close(B[j] @ B[j].T, torch.eye(R, dtype=X.dtype))
    assert z.tolist() == [[float(i // 3 == j) for j in range(3)] for i in range(N)]
    own = torch.softmax(z, 1).amax(1)
    torch.testing.assert_close(own, torch.full_like(own, math.e / (math.e + 2)))
    assert run(Method.mobe, X, m=3, steps=0).relfrob > 0.95


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_corrected_start_gives_the_intended_weights_and_the_best_adapters(activation: str, X: Tensor) -> None:
    start = mobe.corrected_start(X, m=M, r=R, activation=activation, own=0.6, scale=0.2)
    codes = torch.softmax(start.logits, 1)
    torch.testing.assert_close(codes.amax(1), torch.full((N,), 0.6, dtype=X.dtype))
    torch.testing.assert_close(codes.amin(1), torch.full((N,), 0.4 / (M - 1), dtype=X.dtype))
    mixed = mixed_bases(codes, start.bank, lam=0.0, activation="identity")
    assert float(mixed.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-9)
    bases = mixed_bases(codes, start.bank, lam=1.0, activation=activation)
    for A, basis, expert in zip(start.adapters, bases, X, strict=True):
        best = torch.linalg.lstsq(basis.T, expert.T).solution.T
        torch.testing.assert_close(A, best, rtol=1e-6, atol=1e-6)
    first = [
        run(method, X, steps=0, activation=activation).relfrob
        for method in (Method.mobe_corrected, Method.mobe)
    ]
    assert first[0] < 0.9 * first[1]


def test_corrected_start_with_one_atom_is_the_shared_basis_through_phi(X: Tensor) -> None:
    result = run(Method.mobe_corrected, X, m=1, steps=0, activation="identity")
    assert result.relfrob == pytest.approx(run(Method.shared_basis, X).relfrob, rel=1e-6)


def test_matrix_sign_start_spans_the_leading_subspaces_without_the_spectrum(X: Tensor) -> None:
    A, U, V, z = slbf.matrix_sign_start(X, r=R, atom_rank=K)
    for i, expert in enumerate(X):
        left, _, right = torch.linalg.svd(expert, full_matrices=False)
        torch.testing.assert_close(A[i] @ U[i] @ V[i], left[:, :K] @ right[:K])
    assert z.equal(torch.eye(N, dtype=X.dtype))


# --- the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(ADAM_METHODS))
def test_adam_methods_lower_the_error_and_keep_the_best_state(method: Method, X: Tensor) -> None:
    seen: list[tuple[int, float]] = []
    result = run(method, X, steps=105, on_step=lambda point: seen.append((point.step, point.relfrob)))
    assert seen == [(point.step, point.relfrob) for point in result.history]
    assert [step for step, _ in seen] == [*range(0, 105, 10), 105]
    assert result.relfrob < 0.7 * result.history[0].relfrob
    assert result.relfrob == pytest.approx(min(relfrob for _, relfrob in seen), rel=1e-9)
    assert result.stop is StopReason.steps
    assert result.steps == 105


@pytest.mark.parametrize("method", sorted(ADAM_METHODS))
def test_time_limit_ends_a_fit(method: Method, X: Tensor) -> None:
    """By a clock that advances a second at every look."""
    ticks = count()
    result = run(method, X, steps=None, seconds=30.0, clock=lambda: float(next(ticks)))
    assert result.stop is StopReason.time
    assert 30 <= result.seconds <= 33
    assert 20 <= result.steps < 30


def test_a_fit_that_diverges_keeps_its_best_state_and_says_so(X: Tensor) -> None:
    result = run(Method.mobe, X.float(), steps=100, learning_rate=1e30)
    assert result.stop is StopReason.diverged
    assert result.steps < 100
    assert math.isfinite(result.relfrob)
    assert "no longer finite" in result.stop.sentence
    assert all(stop.sentence for stop in StopReason)


def test_a_fit_that_never_was_finite_is_an_error(X: Tensor) -> None:
    with pytest.raises(FitError, match="not finite"):
        run(Method.mobe, X.float() * 1e30, steps=3)


@pytest.mark.parametrize("method", list(SIZES))
def test_equal_seeds_give_equal_results(method: Method, X: Tensor) -> None:
    one, two = (run(method, X.float(), generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.relfrob == two.relfrob
    for first, second in zip((*one.factors, one.mean), (*two.factors, two.mean), strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("mobe", {"m": M, "r": R, "weights_std": 1.0}, "give steps or seconds"),
        ("slbf", {"r": R, "atom_rank": K}, "give steps or seconds"),
        ("mobe", {"m": M, "r": R, "steps": 1}, "give weights_std"),
        ("mobe_corrected", {"m": M, "r": R, "steps": 1, "activation": "gelu"}, "silu, tanh or identity"),
    ],
)
def test_missing_options_are_named(method: str, changes: dict, words: str, X: Tensor) -> None:
    with pytest.raises(ConfigError, match=words):
        baseline_runs.run(method, X, **changes)


# --- gauge ---------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), rank=st.integers(0, 3))
def test_gauge_fixing_keeps_the_product_and_makes_an_identity(seed: int, rank: int) -> None:
    """Of any rank up to k: at rank 0 the atom is zero."""
    m, r, k, d = 2, 5, 3, 7
    U, V = draw(m, r, rank, seed=seed) @ draw(m, rank, k, seed=seed + 1), draw(m, k, d, seed=seed + 2)
    fixed, turned = gauge_fix(U, V)
    torch.testing.assert_close(fixed @ turned, U @ V, rtol=1e-7, atol=1e-7)
    rows = pivot_rows(U)
    for j in range(m):
        assert len(set(rows[j].tolist())) == k
        assert fixed[j, rows[j]].equal(torch.eye(k, dtype=U.dtype))


def test_pivots_are_the_rows_farthest_from_the_span_of_those_before() -> None:
    U = torch.tensor([[[1.0, 0.0], [5.0, 0.1], [4.9, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    assert pivot_rows(U).tolist() == [[1, 3]]
