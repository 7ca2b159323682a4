"""Gauss-Newton never raises the objective, whatever the problem; chunks of experts change no result."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import configured, fitted, normal, plant, sizes_of
from torch import Tensor

from globe.am.coding import code_system
from globe.am.objective import evaluate
from globe.am.records import StepOptions
from globe.am.state import AMState, Atoms, Constraint, low_rank_atoms, start_state
from globe.am.step import am_step
from globe.config.schema import InitConfig
from globe.numerics import chunks


def sketcher(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, AMState, dict[str, Any]]:
    """Experts, a state at rest, and the options of a step: sizes, activation, lam, support, low rank, momentum."""
    n, m = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    p, d, r = draw(st.integers(1, 8)), draw(st.integers(2, 10)), draw(st.integers(1, 6))
    r = min(r, d)
    seed, dtype = draw(st.integers(0, 2**31)), draw(st.sampled_from([torch.float32, torch.float64]))
    activation, lam = (
        draw(st.sampled_from(["identity", "silu", "tanh", "gelu"])),
        draw(st.sampled_from([0.0, 0.4, 1.0])),
    )
    X = normal(n, p, d, seed=seed).to(dtype)
    codes = normal(n, m, seed=seed + 1).abs().to(dtype)
    support = None
    if draw(st.booleans()):
        support = normal(n, m, seed=seed + 2) > 0
        support[:, seed % m] |= ~support.any(dim=1)
        codes = codes * support
    simplex = draw(st.booleans())
    if simplex:
        codes = codes / codes.sum(dim=1, keepdim=True)
    if draw(st.booleans()):
        k = draw(st.integers(1, r))
        atoms = low_rank_atoms(
            normal(m, r, k, seed=seed + 3).to(dtype), normal(m, k, d, seed=seed + 4).to(dtype), codes
        )
    else:
        atoms = Atoms(normal(m, r, d, seed=seed + 3).to(dtype), codes)
    options = {"lam": lam, "activation": activation}
    state = start_state(X, atoms, StepOptions(**options), constraint=Constraint(support, simplex))
    options |= {
        "joint": draw(st.booleans()),
        "coding": draw(st.booleans()),
        "momentum": draw(st.sampled_from([0.0, 0.9])),
        "cg_iterations": draw(st.sampled_from([1, 10])),
    }
    return X, state, options


@settings(max_examples=50)
@given(problems())
def test_a_step_never_raises_the_objective(problem: tuple[Tensor, AMState, dict[str, Any]]) -> None:
    X, state, options = problem
    for step in range(3):
        new, figures = am_step(X, state, StepOptions(**options), generator=sketcher(step))
        assert new.objective <= state.objective
        if not options["coding"]:
            assert figures.accepted == (new.objective < state.objective)
        assert bool((new.atoms.codes >= 0).all())
        assert bool((new.atoms.codes.sum(dim=1) > 0).all())
        if state.constraint.support is not None:
            assert not bool(new.atoms.codes[~state.constraint.support].any())
        if state.constraint.simplex:
            sums = new.atoms.codes.sum(dim=1)
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)
        if new.atoms.left is not None:
            assert new.atoms.right is not None
            assert torch.equal(new.atoms.bank, new.atoms.left @ new.atoms.right)
        state = new


@settings(max_examples=20)
@given(problems())
def test_the_objective_of_a_state_is_that_of_its_factors(
    problem: tuple[Tensor, AMState, dict[str, Any]],
) -> None:
    """Against the slow formula, from the state's own adapters, in float64.

    The residual is rounded in the size of what cancels in it, which adapters of a nearly dependent basis make large.
    """
    X, state, options = problem
    new, _ = am_step(X, state, StepOptions(**options), generator=sketcher())
    bank, codes = new.atoms.bank.double(), new.atoms.codes.double()
    bases = reference.activate(
        reference.mixed(codes, bank), lam=options["lam"], activation=options["activation"]
    )
    residual = X.double() - new.point.adapters.double() @ bases
    sizes = torch.einsum("ij,j->i", codes, bank.norm(dim=(1, 2))) * new.point.adapters.double().norm(
        dim=(1, 2)
    )
    rounding = 100 * torch.finfo(X.dtype).eps * float((sizes + X.double().norm(dim=(1, 2))).norm())
    assert new.point.error**0.5 == pytest.approx(float(residual.norm()), abs=rounding)


FITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {}),
    "silu": ({"activation": "silu", "lam": 1.0}, {}),
    "tanh halfway": ({"activation": "tanh", "lam": 0.5}, {}),
    # an expert left with one atom has a basis of rank 2, which only a ridge makes well conditioned
    "low rank": ({"init": InitConfig(), "lambda_A": 1e-4}, {"atom_rank": 2}),
    "simplex": ({"codes": {"simplex": True}}, {}),
    "codes left to coding": ({"codes": {"joint": False, "every": 2}}, {}),
    "coding at every step": ({"codes": {"every": 1}}, {}),
    "no momentum": ({"momentum": 0.0}, {}),
    "few iterations": ({"cg_iterations": 2}, {}),
    "one-hot start": ({"init": InitConfig(one_hot=1.0)}, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FITS)
def test_a_whole_fit_with_frozen_schedules_descends(name: str, dtype: torch.dtype) -> None:
    options, sizes = FITS[name]
    X = plant(noise=0.2, dtype=dtype).X
    result, records = fitted(X, sizes_of(X, **sizes), configured(steps=15, **options))
    objectives = [record.objective for record in records]
    assert all(after <= before for before, after in pairwise(objectives))
    assert objectives[-1] < objectives[0]
    factors = [part if part is None else part.double() for part in result.factors]
    rebuilt = factors[2] @ reference.activate(
        reference.mixed(factors[1], factors[0]),
        lam=result.lam,
        activation=options.get("activation", "identity"),
    )
    error = float(((X.double() - rebuilt) ** 2).sum() / (X.double() ** 2).sum()) ** 0.5
    assert result.relfrob == records[-1].relfrob == pytest.approx(error, rel=1e-5)
    assert result.relfrob <= result.relfrob_start
    assert result.accepted + result.rejected == result.steps == 15
    assert result.accepted == sum(record.accepted for record in records)


@pytest.mark.parametrize("joint", [True, False])
def test_codes_that_are_held_stay_bit_for_bit(joint: bool) -> None:
    """codes.every=0 without joint leaves the first codes; with joint they move."""
    X = plant().X
    config = configured(steps=3, codes={"joint": joint, "every": 0})
    first, _ = fitted(X, sizes_of(X), configured(steps=1, codes={"joint": False, "every": 0}))
    result, _ = fitted(X, sizes_of(X), config)
    assert torch.equal(result.factors.codes, first.factors.codes) == (not joint)


def test_chunks_of_experts_do_not_change_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = plant(noise=0.3)
    options = {"lam": 0.7, "activation": "silu"}
    whole = evaluate(problem.X, problem.bank, problem.codes, StepOptions(**options))
    system = code_system(problem.bank, whole)
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", 1)
    assert len(list(chunks.expert_chunks(17, 4, 14))) == 5
    parts = evaluate(problem.X, problem.bank, problem.codes, StepOptions(**options))
    for found, wanted in zip(parts, whole, strict=True):
        if isinstance(wanted, Tensor):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert parts.objective == pytest.approx(whole.objective, rel=1e-12)
    for found, wanted in zip(code_system(problem.bank, parts), system, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "silu", "low rank"])
def test_chunks_of_experts_do_not_change_a_fit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options, sizes = FITS[name]
    X = plant(noise=0.2).X
    # few iterations: conjugate gradients double rounding at each, in float64 still far below the tolerance after five
    config = configured(steps=5, cg_iterations=5, **options)
    whole, _ = fitted(X, sizes_of(X, **sizes), config)
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", 1)
    parts, _ = fitted(X, sizes_of(X, **sizes), config)
    assert parts.relfrob == pytest.approx(whole.relfrob, rel=1e-8)
    torch.testing.assert_close(parts.factors.bank, whole.factors.bank, rtol=0, atol=1e-6)


def test_every_expert_is_in_exactly_one_chunk() -> None:
    for n in (0, 1, 4, 17, 60):
        for numbers in (1, 88 * 256, 10**9):
            covered = [i for part in chunks.expert_chunks(n, numbers, 1) for i in range(n)[part]]
            assert covered == list(range(n))


def test_a_long_step_that_is_refused_leaves_the_products_in_low_precision() -> None:
    """First steps can be too long; the fit must not be slower for it ever after. A tiny one ends low precision."""
    X = normal(9, 8, 10, seed=4).float()
    atoms = Atoms(2 * normal(3, 4, 10, seed=14).float(), normal(9, 3, seed=24).abs().float())
    state = start_state(X, atoms, StepOptions(activation="tanh"))
    seen = []
    for damping in (1e-4, 1e4):
        new, figures = am_step(
            X,
            state._replace(damping=damping),
            StepOptions(activation="tanh", momentum=0.95, cg_iterations=30, curvature_dtype=torch.bfloat16),
            generator=sketcher(),
        )
        seen.append((figures.accepted, new.fine))
    assert seen == [(False, False), (True, True)]
