"""Baselines in metrics of every expert's own: closed forms beside slow ones, gradients beside autograd."""

from __future__ import annotations

from itertools import pairwise

import baseline_runs
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from globe.am.records import Factors
from globe.bank.compose import factor_bases, mixed_bases
from globe.baselines import mobe, slbf
from globe.baselines.in_metric import (
    alternated,
    better_mean,
    group_svd_in_metric,
    mean_svd_in_metric,
    svd_in_metric,
)
from globe.numerics.input_metric import InputMetric
from globe.numerics.metric import metric_of_roots, root_of

N, P, D, M, R, K = 8, 6, 11, 3, 4, 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def second_moments(n: int = N, d: int = D) -> Tensor:
    rows = draw(n, 2 * d, d, seed=1) * torch.logspace(0, -1, d, dtype=torch.float64)
    return rows.mT @ rows / rows.shape[1]


@pytest.fixture
def C() -> Tensor:
    return second_moments()


@pytest.fixture
def metric(C: Tensor) -> InputMetric:
    return InputMetric(metric_of_roots(root_of(C)), 0.3 + draw(N, P, seed=2).abs())


@pytest.fixture
def X() -> Tensor:
    return draw(N, P, D, seed=3)


def error(X: Tensor, approximation: Tensor, metric: InputMetric, C: Tensor) -> float:
    """sum_ik D_ik^2 (E_i C_i E_i^T)_kk, entry by entry."""
    assert metric.rows is not None
    E = X - approximation
    return sum(
        float(metric.rows[i, k] ** 2 * E[i, k] @ C[i] @ E[i, k]) for i in range(len(X)) for k in range(P)
    )


def seen(X: Tensor, metric: InputMetric) -> Tensor:
    return metric.seen(X, slice(0, len(X)))


def test_each_expert_has_its_best_approximation(X: Tensor, metric: InputMetric, C: Tensor) -> None:
    """The error is that of the singular values left of D X C^(1/2), whatever root is taken."""
    B, codes, A, *_ = svd_in_metric(seen(X, metric), metric, r=R)
    assert metric.rows is not None
    wanted = 0.0
    for i in range(N):
        root = scipy.linalg.sqrtm(C[i].numpy()).real
        wanted += float(
            (np.linalg.svd(metric.rows[i].numpy()[:, None] * X[i].numpy() @ root)[1][R:] ** 2).sum()
        )
    found = error(
        X, metric.adapters(A, slice(0, N)) @ mixed_bases(codes, B, lam=0.0, activation="identity"), metric, C
    )
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("matrices", [False, True])
def test_no_mean_beside_given_low_ranks_is_better(matrices: bool, X: Tensor, metric: InputMetric) -> None:
    if matrices:
        metric = InputMetric(None, root_of(second_moments(N, P)).mT.contiguous())
    inside = seen(X, metric)
    low = Factors(draw(N, 2, D, seed=5), torch.eye(N), draw(N, P, 2, seed=6))
    mean = draw(P, D, seed=7)
    for _ in range(12):
        mean = better_mean(inside, metric, mean, low)
    mean.requires_grad_()
    left = (inside - seen(mean.expand_as(X), metric) - low.adapters @ low.bank).square().sum()
    (gradient,) = torch.autograd.grad(left, mean)
    assert float(gradient.abs().max()) < 1e-9 * float(left.detach())


def test_a_mean_beside_low_ranks_is_never_worse_than_low_ranks_alone(X: Tensor, C: Tensor) -> None:
    """Rows that hardly count made the mean by itself take any value there."""
    metric = InputMetric(
        metric_of_roots(root_of(C)), torch.logspace(0, -2, P, dtype=torch.float64).repeat(N, 1)
    )
    inside = seen(X, metric)

    def left(factors: Factors, mean: Tensor) -> float:
        A = metric.adapters(factors.adapters, slice(0, N))
        return error(X, A @ factors.bank + mean, metric, C)

    alone = left(svd_in_metric(inside, metric, r=2), torch.zeros(P, D, dtype=torch.float64))
    factors, mean = mean_svd_in_metric(inside, metric, r=2)
    assert left(factors, mean) < 0.95 * alone
    assert (
        float((metric.adapters(factors.adapters, slice(0, N)) @ factors.bank + mean - X).norm() / X.norm())
        < 1
    )


def test_a_planted_mean_is_found_beside_low_ranks(metric: InputMetric) -> None:
    mean, rest = draw(P, D, seed=4), draw(N, P, 2, seed=5) @ draw(N, 2, D, seed=6)
    inside = seen(mean + 0.1 * rest, metric)
    factors, found = mean_svd_in_metric(inside, metric, r=2)
    A = metric.adapters(factors.adapters, slice(0, N))
    left = inside - seen(A @ factors.bank + found, metric)
    assert float(left.norm() / inside.norm()) < 5e-3  # where the rest alone is a tenth
    assert float((found - mean).norm() / mean.norm()) < 0.1


def slow_basis(X: Tensor, metric: InputMetric, C: Tensor, B: Tensor, rounds: int) -> Tensor:
    """Alternating least squares with a dense normal matrix of all r d numbers."""
    assert metric.rows is not None
    for _ in range(rounds):
        H, g = torch.zeros(R * D, R * D, dtype=torch.float64), torch.zeros(R * D, dtype=torch.float64)
        for i in range(len(X)):
            target = metric.rows[i][:, None] * X[i]
            A = torch.linalg.solve(B @ C[i] @ B.T, B @ C[i] @ target.T).T
            H += torch.kron(A.T @ A, C[i])
            g += (A.T @ target @ C[i]).flatten()
        B = torch.linalg.solve(H, g).view(R, D)
    return B


def test_a_shared_basis_descends_to_where_alternation_ends(X: Tensor, metric: InputMetric, C: Tensor) -> None:
    columns = metric.columns
    assert columns is not None
    inside = seen(X, metric)
    factors = group_svd_in_metric(inside, metric, m=1, r=R)
    A = metric.adapters(factors.adapters, slice(0, N))
    found = error(X, A @ factors.bank[0], metric, C)

    def of(B: Tensor) -> float:
        total = 0.0
        for i in range(N):
            seen_basis = B @ columns.roots[i]
            left = inside[i] - inside[i] @ torch.linalg.pinv(seen_basis) @ seen_basis
            total += float(left.square().sum())
        return total

    start = draw(R, D, seed=9)
    slow = [of(start), *(of(slow_basis(X, metric, C, start, rounds)) for rounds in (1, 5, 40, 200))]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(slow))
    assert found < 1.05 * slow[-1]
    once = alternated(inside, columns, torch.ones(N, dtype=torch.bool), start)
    assert of(once) < slow[1]


def test_groups_are_no_worse_than_one_basis(X: Tensor, metric: InputMetric, C: Tensor) -> None:
    inside = seen(X, metric)
    errors = []
    for m in (1, M, N):
        B, codes, A, *_ = group_svd_in_metric(inside, metric, m=m, r=R)
        assert bool((codes.sum(dim=1) == 1).all())
        bases = mixed_bases(codes, B, lam=0.0, activation="identity")
        errors.append(error(X, metric.adapters(A, slice(0, N)) @ bases, metric, C))
    assert errors[0] > errors[1] > errors[2]
    B, codes, A, *_ = svd_in_metric(inside, metric, r=R)
    alone = error(X, metric.adapters(A, slice(0, N)) @ B, metric, C)
    assert alone <= errors[2] < 1.01 * alone


@pytest.mark.parametrize("activation", ["silu", "tanh", "identity"])
def test_gradients_are_those_of_autograd(activation: str, X: Tensor, metric: InputMetric) -> None:
    inside, columns = seen(X, metric), metric.columns
    assert columns is not None
    act = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "identity": lambda y: y}[activation]
    start = mobe.SoftmaxFactors(draw(N, P, R, seed=1), draw(M, R, D, seed=2), draw(N, M, seed=3))
    objective = mobe.MobeObjective(inside, start, activation=activation, metric=columns)
    objective.forward()
    reported = objective.relfrob()
    objective.backward()
    A, B, z = (factor.clone().requires_grad_() for factor in start)
    bases = act(torch.einsum("nm,mrd->nrd", torch.softmax(z, 1), B)) @ columns.roots
    loss = (A @ bases - inside).square().sum() / X.numel()
    loss.backward()
    for ours, reference in zip(objective.parameters, (A, B, z), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-10, atol=1e-14)
    assert reported == pytest.approx(
        (float(loss.detach()) * X.numel()) ** 0.5 / float(inside.norm()), rel=1e-12
    )


def test_starts_of_the_trained_methods_are_brought_back_from_the_mean_metric(
    X: Tensor, metric: InputMetric
) -> None:
    inside, columns = seen(X, metric), metric.columns
    assert columns is not None
    mean, root = columns.in_mean(inside), root_of(columns.mean)
    for found, plain in (
        (
            mobe.published_start(inside, m=M, r=R, weights_std=0.5, metric=columns).bank,
            mobe.published_start(mean, m=M, r=R, weights_std=0.5).bank,
        ),
        (
            slbf.matrix_sign_start(inside, r=R, atom_rank=K, metric=columns).atoms_right,
            slbf.matrix_sign_start(mean, r=R, atom_rank=K).atoms_right,
        ),
    ):
        torch.testing.assert_close(found @ root, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("svd", {"r": R}),
        ("shared_basis", {"r": R}),
        ("mean_svd", {"r": 2}),
        ("group_svd", {"m": M, "r": R}),
        ("mobe", {"m": M, "r": R, "weights_std": 0.1, "steps": 40}),
        ("mobe_corrected", {"m": M, "r": R, "steps": 40}),
        ("slbf", {"r": R, "atom_rank": K, "steps": 40}),
    ],
)
def test_the_reported_error_is_the_weighted_one(
    method: str, sizes: dict[str, int], X: Tensor, metric: InputMetric, C: Tensor
) -> None:
    result = baseline_runs.run(method, seen(X, metric), metric=metric, **sizes)
    M_ = factor_bases(result.factors, lam=result.lam, activation=result.activation)
    approximation = metric.adapters(result.factors.adapters, slice(0, N)) @ M_
    if result.mean is not None:
        approximation = approximation + result.mean
    size = error(X, torch.zeros_like(X), metric, C)
    assert result.relfrob == pytest.approx((error(X, approximation, metric, C) / size) ** 0.5, rel=1e-6)
    assert result.relfrob < 1.0
