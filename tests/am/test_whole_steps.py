"""Whole steps of both dictionary updates against the reference: direction, codes, acceptance, refit, extrapolation."""

from __future__ import annotations

import pytest
import reference
import reference_mod
import reference_moves
import torch
from small_case import (
    ENOUGH,
    R,
    assert_same_moves,
    case,
    damping_units,
    sketcher,
)

from globe.am.records import StepOptions
from globe.am.state import Atoms, Constraint, start_state
from globe.am.step import am_step
from globe.am.warm_start import truncated_svd


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 0.8)])
def test_blended_target(activation: str, lam: float, beta: float) -> None:
    """The step towards beta X + (1 - beta) A pull, with the curvature of the true objective."""
    one = case()
    options = {"lam": lam, "activation": activation}
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, **options)
    M_ = reference.activate(reference.mixed(one.atoms.codes, one.atoms.bank), **options)
    warm = truncated_svd(one.X, R).bases
    pull = reference_mod.aligned(warm, M_)
    target = beta * one.X + (1 - beta) * exact.adapters @ pull
    force = exact.slopes * (exact.adapters.mT @ (target - exact.adapters @ M_))
    state = start_state(one.X, one.atoms, StepOptions(**options), damping=1e-2)
    units = damping_units(one, state.point, joint=True, damping=1e-2)
    wanted = reference_moves.gauss_newton(exact, one.atoms.bank, one.atoms.codes, damping=units, force=force)

    def blended(atoms: Atoms) -> float:
        bases = reference.activate(reference.mixed(atoms.codes, atoms.bank), **options)
        return float(((target - exact.adapters @ bases) ** 2).sum())

    new, figures = am_step(
        one.X,
        state,
        StepOptions(**options, beta=beta, cg_iterations=ENOUGH),
        warm=warm,
        generator=sketcher(),
    )
    moved = one.atoms.moved((wanted["bank"], wanted["codes"]), Constraint(), joint=True)
    if figures.accepted:
        assert_same_moves(
            {"bank": new.atoms.bank - one.atoms.bank, "codes": new.atoms.codes - one.atoms.codes},
            {"bank": moved.bank - one.atoms.bank, "codes": moved.codes - one.atoms.codes},
        )
        assert blended(new.atoms) < blended(one.atoms)
    else:
        assert blended(moved) >= blended(one.atoms)
        assert new.atoms is one.atoms


@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 1.0)])
def test_a_whole_step_is_the_reference_step(activation: str, lam: float) -> None:
    """Without extrapolation: direction, codes clamped at zero, refit."""
    one = case(seed=20)
    options = {"lam": lam, "activation": activation}
    state = start_state(one.X, one.atoms, StepOptions(**options), damping=0.1)
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, **options)
    units = damping_units(one, state.point, joint=True, damping=0.1)
    move = reference_moves.gauss_newton(exact, one.atoms.bank, one.atoms.codes, damping=units)
    bank, codes = one.atoms.bank + move["bank"], (one.atoms.codes + move["codes"]).clamp_min(0)
    wanted = reference.point(one.X, bank, codes, **options)
    assert wanted.objective < exact.objective
    new, figures = am_step(
        one.X,
        state,
        StepOptions(**options, cg_iterations=ENOUGH, momentum=0.0),
        generator=sketcher(),
    )
    assert figures.accepted
    assert new.objective == pytest.approx(wanted.objective, rel=1e-9)
    assert float((new.atoms.bank - bank).norm() / bank.norm()) < 1e-8
    assert float((new.atoms.codes - codes).norm() / codes.norm()) < 1e-8
    assert float((new.point.adapters - wanted.adapters).norm() / wanted.adapters.norm()) < 1e-7


@pytest.mark.parametrize("beta", [0.4, 1.0])
@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 0.8)])
@pytest.mark.parametrize("simplex", [False, True])
def test_a_whole_mod_step_is_the_reference_step(
    simplex: bool, activation: str, lam: float, beta: float
) -> None:
    one = case()
    options = {"lam": lam, "activation": activation}
    codes = one.atoms.codes / one.atoms.codes.sum(dim=1, keepdim=True) if simplex else one.atoms.codes
    atoms = one.atoms.with_codes(codes)
    exact = reference.point(one.X, atoms.bank, codes, **options)
    Y = reference.mixed(codes, atoms.bank)
    M_ = reference.activate(Y, **options)
    warm = truncated_svd(one.X, R).bases
    target = beta * reference_mod.weight_aware(one.X, exact.adapters, lambda_T=1e-3)
    target = target + (1 - beta) * reference_mod.aligned(warm, M_)
    if lam:
        target = Y + exact.slopes * (target - M_) / (exact.slopes**2 + 0.01)
    bank = reference_mod.mod(target, codes, atoms.bank, lambda_B=1e-2)
    if not simplex:
        bank, codes = reference_mod.equal_norms(bank, codes)
    wanted = reference.point(one.X, bank, codes, **options)

    state = start_state(one.X, atoms, StepOptions(**options), constraint=Constraint(None, simplex))
    new, figures = am_step(
        one.X,
        state,
        StepOptions(**options, beta=beta, dictionary="mod", lambda_T=1e-3, lambda_B=1e-2),
        warm=warm,
        generator=sketcher(),
    )
    assert figures.accepted
    assert new.objective == pytest.approx(wanted.objective, rel=1e-8)
    assert float((new.atoms.bank - bank).norm() / bank.norm()) < 1e-8
    assert float((new.atoms.codes - codes).norm() / codes.norm()) < 1e-8


def test_extrapolation_goes_beyond_the_step_by_its_weight() -> None:
    """Atoms = plain + w (plain - last plain), w = k / (k + 3) up to the largest, wherever it was taken."""
    one = case(seed=30)
    options = {"lam": 0.0, "activation": "identity"}
    state = start_state(one.X, one.atoms, StepOptions(**options))
    weights = set()
    for _ in range(8):
        new, _ = am_step(
            one.X,
            state,
            StepOptions(**options, joint=False, momentum=0.5),
            generator=sketcher(),
        )
        weight = min(0.5, new.momentum_steps / (new.momentum_steps + 3))
        expected = torch.lerp(state.anchor.bank, new.anchor.bank, 1 + weight) if weight else new.anchor.bank
        torch.testing.assert_close(new.atoms.bank, expected, rtol=0, atol=1e-12)
        weights.add(weight)
        state = new
    assert {0.25, 0.4, 0.5} <= weights
