"""A ridge on the adapters makes a fit tamer: every fit stays finite, descends, and keeps the size of its bases."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from planted import configured, fitted, normal, sizes_of
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.objective import evaluate, mix
from globe.am.records import StepOptions
from globe.config.schema import InitConfig
from globe.fit.options import fit_options

N, P, D, R = 12, 21, 34, 8
RIDGES = (0.0, 1e-4, 1e-2, 1e-1)


def layer(*, condition: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Experts W_i L of unit deviation: a shared part and noise, and a metric L of the given condition number."""
    bases = torch.einsum("ij,jrd->ird", normal(N, 5, seed=seed).abs(), normal(5, 9, D, seed=seed + 1))
    W = normal(N, P, 9, seed=seed + 2) @ bases / 6 + 0.4 * normal(N, P, D, seed=seed + 3)
    Q = torch.linalg.qr(normal(D, D, seed=seed + 4)).Q
    scales = torch.logspace(0, -torch.tensor(condition).log10().item(), D, dtype=torch.float64)
    X = W @ (Q * scales) @ Q.T
    return (X / X.std()).to(dtype)


@pytest.mark.parametrize("atom_rank", [None, 3])
@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 1.0), ("tanh", 1.0)])
def test_fits_with_any_ridge_stay_finite_and_descend(
    activation: str, lam: float, atom_rank: int | None
) -> None:
    """Before the force knew the ridge's own part, codes doubled at every step until they overflowed."""
    X = layer()
    m = 4 if atom_rank is None else 10
    for ridge in RIDGES:
        config = configured(
            activation=activation, lam=lam, lambda_A=ridge, steps=20, cg_iterations=10, init=InitConfig()
        )
        result, records = fitted(X, sizes_of(X, m, R, atom_rank=atom_rank), config)
        objectives = [record.objective for record in records]
        assert all(after <= before for before, after in pairwise(objectives)), ridge
        assert objectives[-1] < 0.9 * objectives[0], ridge
        assert result.relfrob < result.relfrob_start, ridge
        bases = mix(result.factors.codes, result.factors.bank)
        assert 1e-2 < float(bases.std()) < 1e2, ridge


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
@pytest.mark.parametrize(("m", "atom_rank"), [(4, None), (10, 3)])
def test_linear_fits_in_a_very_anisotropic_metric_stay_finite(
    m: int, atom_rank: int | None, ridge: float
) -> None:
    X = layer(condition=1e4)
    config = configured(lambda_A=ridge, steps=60, cg_iterations=10, init=InitConfig())
    result, records = fitted(X, sizes_of(X, m, 13, atom_rank=atom_rank), config)
    objectives = [record.objective for record in records]
    assert all(after <= before for before, after in pairwise(objectives))
    assert result.relfrob < 0.8 * result.relfrob_start
    assert 1e-2 < float(mix(result.factors.codes, result.factors.bank).std()) < 1e2


@pytest.mark.parametrize("ridge", [1e-4, 1e-1])
def test_the_objective_of_a_linear_fit_knows_no_scale(ridge: float) -> None:
    """Larger bases and smaller adapters are the same fit, so no step is drawn along the bases."""
    X = layer(dtype=torch.float64)
    bank, codes = normal(4, R, D, seed=9), normal(N, 4, seed=10).abs()
    at = evaluate(X, bank, codes, StepOptions(lam=0.0, activation="identity", lambda_A=ridge))
    larger = evaluate(X, 7 * bank, codes, StepOptions(lam=0.0, activation="identity", lambda_A=ridge))
    assert larger.objective == pytest.approx(at.objective, rel=1e-12)
    Y = mix(codes, bank)
    along = (at.force * Y).sum(dim=(1, 2)) / (at.force.norm(dim=(1, 2)) * Y.norm(dim=(1, 2)))
    assert float(along.abs().max()) < 1e-10


def test_a_small_error_is_not_left_to_the_ridge() -> None:
    """Directions of little energy count where the rest is fitted; adapters of few bits keep their ridge."""
    shared = torch.logspace(0, -2, R, dtype=torch.float64)[:, None] * normal(R, D, seed=1)
    X = (normal(N, P, R, seed=2) @ shared + 1e-3 * normal(N, P, D, seed=3)).float()
    X /= X.std()
    sizes = sizes_of(X, 2, R)
    options = fit_options(configured(lambda_A=1e-3, steps=12, init=InitConfig()))
    found, held = (
        fit_bank(X, sizes, one, generator=torch.Generator().manual_seed(0))
        for one in (options, replace(options, least_ridge=1e-3))
    )
    assert found.lambda_A == 0.1 * found.relfrob_start**2 < 1e-4
    assert held.lambda_A == 1e-3
    assert found.relfrob < 0.5 * held.relfrob
