"""The metric of inputs: what it is, that a fit minimises in it, and that nothing changes without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import globe.sizes.search
from globe.am.records import Factors, FitResult, Sizes
from globe.am.refit import refit
from globe.bank.compose import mixed_bases, rebuild
from globe.bank.file import read_artefact
from globe.checkpoint import open_checkpoint
from globe.config.composition import to_config
from globe.errors import FitError
from globe.fit.finalise import finalise
from globe.fit.input_metric import of_model, second_moment_metric
from globe.fit.normalise import normalise
from globe.sizes.budget import Room
from globe.sizes.search import search
from run_support import composed, load, run_in

N, P, D, M, R = 7, 9, 13, 3, 5
SMALL = ("model.max_experts=7", "layer=5", "bank.m=3", "bank.r=11", "train.steps=20", "export_dtype=float32")


def leaning_experts() -> Tensor:
    """Experts whose rows have hardly any energy in half of the directions, which are no axes."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(N, P, D, dtype=torch.float64, generator=generator)
    X *= torch.logspace(0, -2, D, dtype=torch.float64)
    return X @ torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=generator)).Q


def second_moment(X: Tensor) -> Tensor:
    """Slowly: C with mean eigenvalue 1, plus the floor, scaled to leave the energy of X as it is."""
    C = sum(expert.T @ expert for expert in X)
    C = C / C.trace() * X.shape[2] + 1e-3 * torch.eye(X.shape[2], dtype=X.dtype)
    return C * (X.square().sum() / sum((expert @ C @ expert.T).trace() for expert in X))


def test_norms_are_those_of_the_second_moment() -> None:
    X = leaning_experts()
    E = torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(4))
    C = second_moment(X)
    slow = torch.stack([(one @ C @ one.T).trace() for one in E])
    metric = second_moment_metric(X)
    assert metric is not None
    torch.testing.assert_close(metric.norms(E), slow)
    torch.testing.assert_close(metric.norms(E[2:], 2), slow[2:])
    assert float(metric.norms(X).sum()) == pytest.approx(float(X.square().sum()))
    assert float(slow.sum() / E.square().sum()) < 0.9  # most of a random error is where no row is


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_leaving_the_metric_gives_the_experts_back(dtype: torch.dtype, tolerance: float) -> None:
    X = leaning_experts().to(dtype)
    metric, changed = second_moment_metric(X), X.clone()
    assert metric is not None
    metric.enter(changed)
    assert float((changed - X).norm() / X.norm()) > 0.3
    metric.leave(changed)
    assert float((changed - X).norm() / X.norm()) < tolerance


def test_experts_of_zeros_have_the_plain_metric() -> None:
    assert second_moment_metric(torch.zeros(N, P, D)) is None


def test_factors_leave_the_metric_as_the_experts_do() -> None:
    X = leaning_experts()
    metric, generator = second_moment_metric(X), torch.Generator().manual_seed(5)
    assert metric is not None
    assert metric.columns is not None
    assert metric.kernel(linear=True) is None
    assert metric.kernel(linear=False) is metric.columns
    codes, left = torch.rand(N, M, dtype=X.dtype), torch.randn(M, R, 2, dtype=X.dtype, generator=generator)
    right, adapters = torch.randn(M, 2, D, dtype=X.dtype), torch.randn(N, P, R, dtype=X.dtype)
    inside = Factors(left @ right, codes, adapters, left, right)
    outside = of_model(metric, inside, linear=True)
    assert outside.right is not None
    torch.testing.assert_close(left @ outside.right, outside.bank)
    seen, plain = (adapters @ torch.einsum("nm,mrd->nrd", codes, one.bank) for one in (inside, outside))
    torch.testing.assert_close(metric.seen(plain, slice(0, N)), seen)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_the_last_refit_is_the_best_in_the_metric(activation: str) -> None:
    """No error is left along M in the metric: (X - A M) C M^T = 0, where the plain refit leaves some."""
    one = normalise(leaning_experts(), centre="scalar", scale="family")
    X, generator = one.experts, torch.Generator().manual_seed(6)
    bank = torch.randn(M, R, D, dtype=X.dtype, generator=generator)
    codes = torch.rand(N, M, dtype=X.dtype, generator=generator)
    factors = Factors(bank, codes, torch.zeros(N, P, R, dtype=X.dtype))
    bases = mixed_bases(codes, bank, lam=1.0, activation=activation)
    C, metric = second_moment(X), second_moment_metric(X)
    left = {}
    for name, chosen in (("metric", metric), ("plain", None)):
        done = finalise(
            factors,
            one,
            lam=1.0,
            activation=activation,
            export_dtype=torch.float64,
            prune=0.0,
            refit=lambda X, M: refit(X, M).adapters,
            metric=chosen,
        )
        error = X - done.factors.adapters / done.scale[:, None, None] @ bases  # type: ignore[index]
        left[name] = float((error @ C @ bases.mT).abs().max())
        if chosen is not None:
            seen = sum(float((one @ C @ one.T).trace()) for one in error)
            assert done.relfrob_metric == pytest.approx((seen / float(X.square().sum())) ** 0.5)
        else:
            assert done.relfrob_metric is None
    assert left["metric"] < 1e-9 < 1e-2 < left["plain"]


@pytest.mark.parametrize(
    "options",
    [
        ("bank.activation=identity",),
        ("bank.activation=identity", "bank.atom_rank=6"),
        ("bank.activation=silu",),
        ("schedule=linear",),
        ("method=svd",),
        ("method=mean_svd",),
        ("method=mobe_corrected", "bank.activation=identity"),
    ],
)
def test_a_run_gains_in_the_metric_what_it_pays_in_relfrob(tmp_path: Path, options: tuple[str, ...]) -> None:
    plain, _ = run_in(tmp_path, *SMALL, *options)
    figure, folder = run_in(tmp_path, *SMALL, *options, "normalise.metric=experts")
    (bank,) = load(folder / "summary.json")["banks"]
    artefact = read_artefact(folder / "banks" / "layer005.up")
    W = open_checkpoint(None).read_experts(5, "up", max_experts=7).weights.double()
    X = normalise(W, centre="scalar", scale="family").experts
    error = (W - rebuild(artefact, range(7), dtype=torch.float64)) / artefact.scale.double()[:, None, None]  # type: ignore[union-attr]
    C = second_moment(X)
    seen = float(((error @ C) * error).sum() / X.square().sum()) ** 0.5
    assert bank["metrics"]["relfrob_metric"] == pytest.approx(seen, rel=1e-4)
    assert figure == pytest.approx(float(error.norm() / X.norm()), rel=1e-4)
    _, other = run_in(tmp_path, *SMALL, *options)
    before = rebuild(read_artefact(other / "banks" / "layer005.up"), range(7), dtype=torch.float64)
    error = (W - before) / artefact.scale.double()[:, None, None]  # type: ignore[union-attr]
    if options != ("method=mean_svd",):  # whose mean is fitted in turn with the rest in a metric alone
        assert figure > plain
    assert seen < float(((error @ C) * error).sum() / X.square().sum()) ** 0.5


def test_one_shared_basis_is_its_own_optimum_in_the_metric(tmp_path: Path) -> None:
    """It is spanned by the first eigenvectors of C, whatever their weights: what makes it a strong baseline."""
    options = (*SMALL, "method=shared_basis")
    plain, _ = run_in(tmp_path, *options)
    figure, _ = run_in(tmp_path, *options, "normalise.metric=experts")
    assert figure == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(("activation", "inside"), [("identity", False), ("tanh", True)])
def test_the_search_compares_in_the_metric_of_the_fit(
    monkeypatch: pytest.MonkeyPatch, activation: str, inside: bool
) -> None:
    seen: list[Tensor] = []

    def fit(X: Tensor, sizes: Sizes, *rest: object, metric: object, **also: object) -> FitResult:
        seen.append(X)
        assert (metric is not None) == inside
        raise FitError("enough")

    monkeypatch.setattr(globe.sizes.search, "fit_bank", fit)
    X = leaning_experts()
    options = ("bank.kept=0.6", f"bank.activation={activation}", "normalise.metric=experts")
    metric = second_moment_metric(X)
    assert metric is not None
    config = to_config(composed(*options))
    with pytest.raises(FitError, match="no size"):
        search(X, Room(N, P, D, 491), config, metric=metric, seed=0, allows=lambda m: True)
    wanted = metric.seen(X, slice(0, N))
    assert all(torch.equal(one, wanted) for one in seen)
    assert seen
