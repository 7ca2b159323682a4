"""Coding: the normal equations of the codes, the non-negative solve, and the entmax support."""

from __future__ import annotations

import pytest
import reference
import reference_codes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import normal, plant
from torch import Tensor

from globe.am.coding import (
    code_system,
    contributions,
    entmax_support,
    median_support,
    propose_codes,
    support_of_median,
)
from globe.am.objective import evaluate, mix
from globe.am.records import StepOptions
from globe.am.state import Atoms, Constraint, start_state
from globe.am.step import coding_step

N, P, D, M, R = 6, 8, 9, 5, 4
MAPS = ("entmax15", "sparsemax")
LINEAR = {"lam": 0.0, "activation": "identity"}


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    X, bank = normal(N, P, D, seed=seed), normal(M, R, D, seed=seed + 1)
    return X, bank, normal(N, M, seed=seed + 2).abs()


@pytest.mark.parametrize(
    ("activation", "lam"), [("identity", 0.0), ("silu", 1.0), ("tanh", 0.5), ("gelu", 0.9)]
)
def test_code_system_agrees_with_the_dense_jacobian(activation: str, lam: float) -> None:
    X, bank, codes = problem()
    K, h = code_system(bank, evaluate(X, bank, codes, StepOptions(lam=lam, activation=activation)))
    wanted = reference_codes.code_system(
        reference.point(X, bank, codes, lam=lam, activation=activation), bank
    )
    for found, exact in ((K, wanted[0]), (h, wanted[1])):
        assert float((found - exact).norm()) <= 1e-8 * float(exact.norm())


@pytest.mark.parametrize(
    "options", ["free", "support", "l1", "l1 on a support", "simplex", "simplex on a support"]
)
@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 1.0)])
@pytest.mark.parametrize("seed", [0, 10])
def test_proposed_codes_minimise_the_linearised_objective(
    seed: int, activation: str, lam: float, options: str
) -> None:
    """Against every set of atoms in use. The relative ridge towards the present codes is 1e-3."""
    X, bank, codes = problem(seed)
    simplex, l1 = options.startswith("simplex"), 0.3 if options.startswith("l1") else 0.0
    support = None
    if options.endswith("support"):
        support = normal(N, M, seed=seed + 5) > -0.5
        support[:, 1] = True
        codes = codes * support
    if simplex:
        codes = codes / codes.sum(dim=1, keepdim=True)
    at = evaluate(X, bank, codes, StepOptions(lam=lam, activation=activation))
    found = propose_codes(bank, codes, at, support=support, l1=l1, simplex=simplex)
    K, h = reference_codes.code_system(reference.point(X, bank, codes, lam=lam, activation=activation), bank)
    sparse = False
    for i in range(N):
        mean = K[i].diagonal().mean()
        damped = K[i] + 1e-3 * mean * torch.eye(M, dtype=K.dtype)
        wanted = reference_codes.best_codes(
            damped,
            h[i],
            codes[i],
            price=l1 * reference_codes.price_of_codes(damped.diagonal(), codes[i], bank),
            simplex=simplex,
            support=None if support is None else support[i],
        )
        sparse |= bool((wanted == 0).any())
        if not bool(wanted.any()):
            # no code is worth its price: an expert is not left without any, it keeps its present ones
            assert torch.equal(found[i], codes[i])
            continue
        # the sum is held at one by a heavy row, not exactly
        tolerance = 1e-6 if simplex else 1e-8
        assert float((found[i] - wanted).norm()) <= tolerance * float(wanted.norm()), i
    assert sparse, "no code at its bound: the case shows nothing"


def test_the_price_of_codes_is_the_same_in_every_gauge() -> None:
    """Neither the scale of an expert's codes, which the adapters absorb, nor an atom's norm makes a code dearer."""
    X, bank, codes = problem()
    found = propose_codes(bank, codes, evaluate(X, bank, codes, StepOptions(**LINEAR)), l1=0.3)
    assert 0 < int((found == 0).sum()) < found.numel()
    small = propose_codes(bank, codes / 50, evaluate(X, bank, codes / 50, StepOptions(**LINEAR)), l1=0.3)
    torch.testing.assert_close(50 * small, found, rtol=1e-8, atol=1e-9)


def test_l1_shrinks_small_codes_and_leaves_the_scale() -> None:
    X, bank, codes = problem()
    at = evaluate(X, bank, codes, StepOptions(**LINEAR))
    ratios, sums = [], []
    for l1 in (0.0, 0.1, 0.5):
        size = contributions(propose_codes(bank, codes, at, l1=l1), bank)
        ratios.append(float((size.sum(dim=1) / torch.linalg.vector_norm(size, dim=1)).mean()))
        sums.append(float(size.norm()))
    assert ratios[0] > ratios[1] > ratios[2] >= 1
    assert sums[2] > 0.5 * sums[0]


@pytest.mark.parametrize("simplex", [False, True])
def test_no_price_leaves_an_expert_without_codes(simplex: bool) -> None:
    X, bank, codes = problem()
    codes = codes / codes.sum(dim=1, keepdim=True)
    found = propose_codes(
        bank, codes, evaluate(X, bank, codes, StepOptions(**LINEAR)), l1=1e6, simplex=simplex
    )
    assert bool((found >= 0).all())
    assert bool((found.sum(dim=1) > 0).all())


def test_an_expert_whose_codes_would_all_vanish_keeps_its_present_ones() -> None:
    X, bank, codes = problem()
    at = evaluate(X, bank, codes, StepOptions(**LINEAR))
    against_all = torch.linalg.pinv(bank.flatten(1)).sum(dim=1).view(R, D)
    at = at._replace(force=at.force - 1e6 * against_all)
    assert torch.equal(propose_codes(bank, codes, at), codes)


def test_contributions_do_not_depend_on_the_gauge() -> None:
    _, bank, codes = problem()
    gauge = torch.tensor([0.01, 1.0, 3.0, 100.0, 0.5], dtype=torch.float64)
    wanted = torch.tensor(
        [[float((codes[i, j] * bank[j]).norm()) for j in range(M)] for i in range(N)]
    ).double()
    torch.testing.assert_close(contributions(codes, bank), wanted, rtol=1e-6, atol=0)
    moved = contributions(codes / gauge, bank * gauge[:, None, None])
    torch.testing.assert_close(moved, contributions(codes, bank), rtol=1e-12, atol=0)


@pytest.mark.parametrize("code_map", MAPS)
def test_temperature_one_keeps_the_support_and_others_move_it_the_right_way(code_map: str) -> None:
    _, bank, codes = problem()
    codes = codes * (normal(N, M, seed=4) > -0.4)
    codes[codes.sum(dim=1) == 0] = 1.0
    present = codes > 0
    at_one = entmax_support(codes, bank, temperature=1.0, code_map=code_map)
    assert torch.equal(at_one, present)
    colder = entmax_support(codes, bank, temperature=0.3, code_map=code_map)
    hotter = entmax_support(codes, bank, temperature=20.0, code_map=code_map)
    assert bool((colder <= present).all())
    assert int(colder.sum()) < int(present.sum())
    assert bool((hotter >= present).all())
    assert int(hotter.sum()) > int(present.sum())


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(2, 13),
    st.integers(2, 11),
    st.integers(1, 12),
    st.sampled_from(MAPS),
    st.sampled_from(["continuous", "equal", "few values"]),
)
def test_support_of_median_meets_its_target_and_is_never_empty(
    seed: int, n: int, m: int, target: int, code_map: str, values: str
) -> None:
    """Exactly, where the contributions are all different: one atom at a time leaves the support."""
    codes = normal(n, m, seed=seed).abs() + 1e-3
    if values == "equal":
        codes = torch.ones_like(codes)
    elif values == "few values":
        codes = codes.round() + 1
    bank = normal(m, 3, 4, seed=seed % 1000)
    bank = bank / torch.linalg.vector_norm(bank, dim=(1, 2), keepdim=True)
    support = support_of_median(codes, bank, median=target, code_map=code_map)
    assert bool(support.any(dim=1).all())
    median = median_support(codes * support)
    assert median <= target
    if values == "continuous":
        assert median == min(target, m)


def test_support_of_median_keeps_the_largest_contributions() -> None:
    _, bank, codes = problem()
    support = support_of_median(codes, bank, median=2, code_map="entmax15")
    size = contributions(codes, bank)
    for i in range(N):
        kept, dropped = size[i][support[i]], size[i][~support[i]]
        assert len(dropped) == 0 or float(kept.min()) > float(dropped.max())


def test_supports_that_already_meet_the_target_stay() -> None:
    _, bank, codes = problem()
    codes[:, 3:] = 0
    assert torch.equal(support_of_median(codes, bank, median=4, code_map="entmax15"), codes > 0)


@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.6, 1.0]),
    st.sampled_from(["silu", "tanh", "gelu"]),
    st.booleans(),
)
@settings(max_examples=25)
def test_coding_raises_no_experts_error(seed: int, lam: float, activation: str, simplex: bool) -> None:
    X, bank, codes = problem(seed)
    if simplex:
        codes = codes / codes.sum(dim=1, keepdim=True)
    state = start_state(
        X,
        Atoms(bank, codes),
        StepOptions(lam=lam, activation=activation),
        constraint=Constraint(None, simplex),
    )
    new = coding_step(X, state, StepOptions(lam=lam, activation=activation))
    assert bool((new.point.errors <= state.point.errors * (1 + 1e-12)).all())
    assert new.objective < state.objective
    assert bool((new.atoms.codes >= 0).all())
    assert bool((new.atoms.codes.sum(dim=1) > 0).all())
    if simplex:
        torch.testing.assert_close(new.atoms.codes.sum(dim=1), torch.ones(N).double(), rtol=0, atol=1e-12)
    # and the point is that of the codes
    again = evaluate(X, bank, new.atoms.codes, StepOptions(lam=lam, activation=activation))
    assert new.objective == pytest.approx(again.objective, rel=1e-12)


def test_coding_brings_back_an_atom() -> None:
    """An atom with code zero, which entmax's own gradient could not revive."""
    truth = plant(N, P, D, M, R, seed=3)
    codes = truth.codes.clone()
    codes[0, 2] = 0
    state = start_state(truth.X, Atoms(truth.bank, codes), StepOptions(**LINEAR))
    for _ in range(30):
        state = coding_step(truth.X, state, StepOptions(**LINEAR))
    assert float(state.atoms.codes[0, 2]) > 0
    torch.testing.assert_close(
        mix(state.atoms.codes, truth.bank)[0] / state.atoms.codes[0].norm(),
        mix(truth.codes, truth.bank)[0] / truth.codes[0].norm(),
        rtol=0,
        atol=1e-3,
    )


def test_coding_on_a_support_keeps_to_it_and_remembers_it() -> None:
    X, bank, codes = problem()
    support = normal(N, M, seed=8) > 0.2
    support[:, 0] |= ~support.any(dim=1)
    state = start_state(X, Atoms(bank, codes), StepOptions(**LINEAR))
    new = coding_step(X, state, StepOptions(**LINEAR), support=support)
    assert not bool(new.atoms.codes[~support].any())
    assert bool((new.atoms.codes.sum(dim=1) > 0).all())
    assert new.constraint.support is not None
    assert torch.equal(new.constraint.support, support)
    cut = evaluate(X, bank, codes * support, StepOptions(**LINEAR))
    assert bool((new.point.errors <= cut.errors * (1 + 1e-12)).all())


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_feasible_codes_are_never_negative_forbidden_or_gone(seed: int, masked: bool, simplex: bool) -> None:
    before = normal(N, M, seed=seed).abs()
    support = None
    if masked:
        support = normal(N, M, seed=seed + 1) > 0.5
        support[:, seed % M] |= ~support.any(dim=1)
        before = before * support
        before = torch.where(before.sum(dim=1, keepdim=True) > 0, before, support.double())
    before = before / before.sum(dim=1, keepdim=True)
    wanted = normal(N, M, seed=seed + 2)
    wanted[0] = -1
    found = Constraint(support, simplex).feasible(wanted, before)
    assert bool((found >= 0).all())
    assert bool((found.sum(dim=1) > 0).all())
    torch.testing.assert_close(found[0], before[0])
    if support is not None:
        assert not bool(found[~support].any())
    if simplex:
        torch.testing.assert_close(found.sum(dim=1), torch.ones(N).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 4])
def test_the_code_of_a_single_atom_stays_near_where_it_is(r: int, dtype: torch.dtype) -> None:
    """Its scale is free: the adapters absorb it. Rounding over rounding must not send it anywhere."""
    X, bank, codes = normal(N, P, D, seed=0), normal(1, r, D, seed=1), normal(N, 1, seed=2).abs()
    X, bank, codes = X.to(dtype), bank.to(dtype), codes.to(dtype)
    found = propose_codes(bank, codes, evaluate(X, bank, codes, StepOptions(**LINEAR)))
    torch.testing.assert_close(found, codes, rtol=0.4, atol=0)
