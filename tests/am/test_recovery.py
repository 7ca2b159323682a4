"""Planted answers are found, experts are reproduced where they can be, and degenerate problems survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import configured, fitted, normal, plant, sizes_of
from torch import Tensor

from globe.am.dictionary.preconditioner import precondition
from globe.am.dictionary.tangent import tangent
from globe.am.objective import evaluate
from globe.am.records import Factors, FitResult, StepOptions
from globe.am.state import Atoms, low_rank_atoms, start_state
from globe.am.step import am_step
from globe.config.choices import FirstCodes, Seeding
from globe.config.schema import InitConfig

DTYPES = [torch.float64, torch.float32]


def best_of(starts: int, enough: float, X: Tensor, sizes: Any, config: Any) -> FitResult:
    """The best of a few seeds, no more than needed: these problems have minima besides the planted one."""
    found = None
    for seed in range(starts):
        result, _ = fitted(X, sizes, config, seed=seed)
        if found is None or result.relfrob < found.relfrob:
            found = result
        if found.relfrob < enough:
            break
    assert found is not None
    return found


@pytest.mark.parametrize("init", [None, InitConfig()], ids=["aligned picks, nnls", "default start"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_planted_bank_is_found(dtype: torch.dtype, init: InitConfig | None) -> None:
    truth = plant(dtype=dtype)
    found = best_of(5, 1e-4, truth.X, sizes_of(truth.X), configured(steps=40, cg_iterations=20, init=init))
    assert found.relfrob < 1e-4
    # and what was found is the planted mixed bases: the same row space for every expert
    bases = torch.einsum("ij,jrd->ird", found.factors.codes, found.factors.bank).double()
    wanted = torch.einsum("ij,jrd->ird", truth.codes, truth.bank).double()
    for one, other in zip(bases, wanted, strict=True):
        both = torch.linalg.qr(one.mT).Q.mT @ torch.linalg.qr(other.mT).Q
        assert float(torch.linalg.svdvals(both).min()) > 1 - 1e-5


def test_the_default_start_goes_below_the_floor_of_noise_and_unaligned_groups_do_not() -> None:
    """The floor is the error of the planted bank itself; a fit follows some of the noise."""
    truth = plant(n=24, p=20, d=28, m=4, r=6, noise=0.4)
    sizes = sizes_of(truth.X, 4, 6)
    floor = evaluate(truth.X, truth.bank, truth.codes, StepOptions(lam=0.0, activation="identity")).objective
    floor = (floor / float(truth.X.square().sum())) ** 0.5
    ends = {}
    for init in (InitConfig(), InitConfig(seeding=Seeding.group_svd)):
        ends[init.seeding] = [
            fitted(truth.X, sizes, configured(steps=40, init=init), seed=seed)[0].relfrob for seed in (0, 1)
        ]
    assert max(ends[InitConfig().seeding]) < floor
    assert min(ends[Seeding.group_svd]) > 1.01 * floor


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_a_planted_bank_is_found_through_an_activation(activation: str) -> None:
    truth = plant(m=2, r=4, activation=activation, lam=1.0)
    config = configured(activation=activation, lam=1.0, steps=40, cg_iterations=20)
    assert best_of(8, 1e-4, truth.X, sizes_of(truth.X, 2, 4), config).relfrob < 1e-4


NEAR: dict[str, dict[str, Any]] = {
    "dense": {},
    "rank 2": {"k": 2},
    "rank 3": {"k": 3},
    "silu": {"activation": "silu", "lam": 1.0},
    "tanh": {"activation": "tanh", "lam": 1.0},
    "gelu halfway": {"activation": "gelu", "lam": 0.5},
    "rank 2, silu": {"k": 2, "activation": "silu", "lam": 1.0},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NEAR)
def test_steps_from_near_the_planted_answer_reach_it(name: str, dtype: torch.dtype) -> None:
    """All factors 15 % off: no other minimum in the way, every kind of atom and activation."""
    options = NEAR[name]
    truth = plant(seed=1, dtype=dtype, **options)

    def off(factor: Tensor, seed: int) -> Tensor:
        return factor * (1 + 0.15 * normal(*factor.shape, seed=seed).to(dtype))

    codes = off(truth.codes, 5).abs()
    if truth.left is None or truth.right is None:
        atoms = Atoms(off(truth.bank, 6), codes)
    else:
        atoms = low_rank_atoms(off(truth.left, 6), off(truth.right, 7), codes)
    fixed = {"lam": options.get("lam", 0.0), "activation": options.get("activation", "identity")}
    state = start_state(truth.X, atoms, StepOptions(**fixed))
    total = float((truth.X.double() ** 2).sum())
    assert (state.point.error / total) ** 0.5 > 0.05
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        state, _ = am_step(
            truth.X,
            state,
            StepOptions(**fixed, coding=step % 5 == 0, cg_iterations=20),
            generator=generator,
        )
        if (state.point.error / total) ** 0.5 < 1e-4:
            break
    assert (state.point.error / total) ** 0.5 < 1e-4


def test_the_floor_of_a_noisy_plant_is_reached() -> None:
    """Within 1 % of the error that the planted bank and codes leave."""
    truth = plant(noise=0.1)
    floor = evaluate(truth.X, truth.bank, truth.codes, StepOptions(lam=0.0, activation="identity")).objective
    relfrob = (floor / float((truth.X**2).sum())) ** 0.5
    assert relfrob > 0.05
    found = best_of(5, 1.01 * relfrob, truth.X, sizes_of(truth.X), configured(steps=30, cg_iterations=20))
    assert found.relfrob <= 1.01 * relfrob


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "d"), [(4, 9), (9, 4)])
def test_as_many_atoms_as_experts_at_full_rank_lose_nothing(p: int, d: int, dtype: torch.dtype) -> None:
    """m = n, r = min(p, d), every expert its own atom."""
    n, r = 6, min(p, d)
    X = normal(n, p, d, seed=0).to(dtype)
    result, _ = fitted(X, sizes_of(X, n, r), configured(steps=3, init=InitConfig(one_hot=1.0)))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert result.relfrob < tolerance
    factors = result.factors
    rebuilt = factors.adapters @ torch.einsum("ij,jrd->ird", factors.codes, factors.bank)
    torch.testing.assert_close(rebuilt, X, rtol=0, atol=20 * tolerance)
    assert result.energy_captured == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_codes_lose_nothing_either(dtype: torch.dtype) -> None:
    """The exact bank is another one then, and is reached only step by step."""
    n, p, d = 6, 4, 9
    X = normal(n, p, d, seed=0).to(dtype)
    result, _ = fitted(X, sizes_of(X, n, p), configured(steps=30, cg_iterations=30, init=InitConfig()))
    assert result.relfrob_start > 0.3
    assert result.relfrob < (1e-3 if dtype == torch.float64 else 2e-2)


def test_energy_captured_is_the_ceiling_of_the_fit() -> None:
    X = plant(noise=0.3).X
    result, _ = fitted(X, sizes_of(X), configured(steps=10))
    values = torch.linalg.svdvals(X)
    assert result.energy_captured == pytest.approx(
        float((values[:, :4] ** 2).sum() / (values**2).sum()), rel=1e-10
    )
    assert result.relfrob**2 >= 1 - result.energy_captured


DEGENERATE: dict[str, tuple[int, int, dict[str, Any]]] = {
    "two atoms, as many rows as an expert": (2, 10, {}),
    "three atoms, nearly as many": (3, 9, {}),
    "two atoms of rank 2 cannot fill 5 rows": (2, 5, {"atom_rank": 2}),
    "three atoms of rank 1": (3, 5, {"atom_rank": 1}),
    "one atom": (1, 4, {}),
    "one atom each": (3, 5, {"target_support": 1}),
    "rank 2, one atom each": (3, 5, {"atom_rank": 2, "target_support": 1}),
}


@pytest.mark.parametrize("activation", ["identity", "silu", "tanh"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_nearly_rank_deficient_bases_survive_in_float32(name: str, activation: str) -> None:
    """Experts that themselves lie in few directions, so that the mixed bases lose rank as the fit goes on."""
    m, r, more = DEGENERATE[name]
    X = plant(m=2, r=4, k=1, noise=1e-4, dtype=torch.float32, activation=activation, lam=1.0).X
    for init in (InitConfig(), InitConfig(seeding=Seeding.aligned, codes=FirstCodes.nnls, scale=3.0)):
        config = configured(activation=activation, lam=1.0, steps=8, cg_iterations=8, init=init)
        result, records = fitted(X, sizes_of(X, m, r, **more), config)
        assert 0 <= result.relfrob < 1
        kept: tuple[Tensor | None, ...] = result.factors
        assert all(bool(torch.isfinite(factor).all()) for factor in kept if factor is not None)
        if "target_support" not in more:
            assert records[-1].objective <= records[0].objective
            # the smallest ridge of float32 may trade errors of this size for smaller adapters
            assert result.relfrob <= result.relfrob_start + 1e-4


def test_regularised_solves_are_counted() -> None:
    """Two atoms of rank 2 give bases of rank 4 at r = 5 in every step, and the result counts their solves."""
    X = plant(m=2, r=4, k=1, noise=1e-6, dtype=torch.float32).X
    result, records = fitted(X, sizes_of(X, 2, 5, atom_rank=2), configured(steps=10, init=InitConfig()))
    solves = (result.accepted + result.rejected) * len(X)
    assert 0 < solves // 2 < result.regularised_solves == records[-1].regularised_solves
    assert len(records) * len(X) >= result.regularised_solves
    healthy = plant(noise=0.3).X
    assert fitted(healthy, sizes_of(healthy), configured(steps=5))[0].regularised_solves == 0


def test_low_rank_blocks_survive_huge_adapters_off_their_columns() -> None:
    """U^T P U in float32 where P is 1e9 times larger off the columns of U: its sign is lost unless factored."""
    m, r, k = 3, 5, 2
    truth = plant(m=m, r=r, k=k, dtype=torch.float32)
    assert truth.left is not None
    assert truth.right is not None
    direction = torch.nn.functional.normalize(normal(r, seed=3), dim=0)
    left = truth.left.double()
    left = (left - torch.einsum("a,b,jbk->jak", direction, direction, left)).float()
    bank = left @ truth.right
    at = evaluate(truth.X, bank, truth.codes, StepOptions(lam=0.0, activation="identity"))
    at = at._replace(gram=at.gram + 1e9 * torch.outer(direction, direction).float())
    slopes = tangent(bank, truth.codes, left=left, right=truth.right, joint=False)
    found = precondition(slopes, at, damping=1e-3, generator=torch.Generator().manual_seed(0))
    assert found.right is not None
    assert bool(torch.isfinite(found.right).all())
    assert bool((torch.linalg.eigvalsh(found.right) > 0).all())


def test_an_expert_of_zeros_and_equal_experts_survive() -> None:
    X = normal(5, 6, 8, seed=0).float()
    X[1], X[3] = 0, X[2]
    for seeding in Seeding:
        for codes in FirstCodes:
            config = configured(steps=4, init=InitConfig(seeding=seeding, codes=codes))
            result, _ = fitted(X, sizes_of(X, 2, 3), config)
            assert 0 < result.relfrob < 1
            assert not bool(result.factors.adapters[1].any())
    zeros, _ = fitted(torch.zeros(5, 6, 8), sizes_of(X, 2, 3), configured(steps=2))
    assert (zeros.relfrob, zeros.relfrob_start, zeros.energy_captured) == (0, 0, 1)


def same(one: Factors, other: Factors) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{}, {"atom_rank": 2}, {"target_support": 2}])
def test_a_seed_decides_the_fit(more: dict[str, Any]) -> None:
    X = plant(noise=0.2, dtype=torch.float32).X
    config = configured(steps=6, init=InitConfig())
    results = [fitted(X, sizes_of(X, **more), config, seed=seed)[0] for seed in (4, 4, 5)]
    assert same(results[0].factors, results[1].factors)
    assert results[0].relfrob == results[1].relfrob
    assert not same(results[0].factors, results[2].factors)


def test_a_fit_leaves_the_global_generator_alone() -> None:
    X = plant(noise=0.2).X
    before = torch.random.get_rng_state()
    fitted(X, sizes_of(X, atom_rank=2), configured(steps=2, init=InitConfig()))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_low_rank_factors_make_the_bank() -> None:
    X = plant(noise=0.2).X
    factors = fitted(X, sizes_of(X, atom_rank=2), configured(steps=3, init=InitConfig()))[0].factors
    assert factors.left is not None
    assert factors.right is not None
    assert factors.left.shape == (3, 4, 2)
    assert factors.right.shape == (3, 2, 14)
    assert torch.equal(factors.bank, factors.left @ factors.right)
