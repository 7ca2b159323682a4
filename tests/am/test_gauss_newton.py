"""The projected Gauss-Newton direction against a direct solve of its dense normal matrix, for every option."""

from __future__ import annotations

import pytest
import reference
import reference_codes
import reference_moves
import torch
from planted import normal
from small_case import (
    M,
    N,
    P,
    R,
    assert_same_moves,
    case,
    damping_units,
    direction,
    sketcher,
    slopes_at,
)

from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.preconditioner import precondition
from globe.am.objective import evaluate, mix
from globe.am.records import StepOptions


@pytest.mark.parametrize(
    ("masked", "joint", "lambda_B"),
    [(False, True, 0.0), (True, True, 0.05), (False, False, 0.05), (True, False, 0.0)],
)
@pytest.mark.parametrize(
    ("activation", "lam"), [("identity", 0.0), ("silu", 1.0), ("tanh", 0.5), ("gelu", 0.9)]
)
def test_dense_atoms(activation: str, lam: float, masked: bool, joint: bool, lambda_B: float) -> None:
    one = case(masked=masked)
    at = evaluate(one.X, one.atoms.bank, one.atoms.codes, StepOptions(lam=lam, activation=activation))
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, lam=lam, activation=activation)
    units = damping_units(one, at, joint=joint, damping=1e-2)
    wanted = reference_moves.gauss_newton(
        exact,
        one.atoms.bank,
        one.atoms.codes,
        damping=units,
        free=one.free,
        joint=joint,
        ridge=lambda_B / 1e-2 * units["bank"],
    )
    assert_same_moves(direction(one, at, joint=joint, damping=1e-2, lambda_B=lambda_B), wanted)


@pytest.mark.parametrize(
    ("masked", "joint", "lambda_B"),
    [(False, True, 0.0), (True, True, 0.05), (False, False, 0.05), (True, False, 0.0)],
)
@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 1.0)])
def test_low_rank_atoms(activation: str, lam: float, masked: bool, joint: bool, lambda_B: float) -> None:
    one = case(low_rank=True, masked=masked)
    at = evaluate(one.X, one.atoms.bank, one.atoms.codes, StepOptions(lam=lam, activation=activation))
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, lam=lam, activation=activation)
    units = damping_units(one, at, joint=joint, damping=3e-2)
    wanted = reference_moves.gauss_newton(
        exact,
        one.atoms.bank,
        one.atoms.codes,
        left=one.atoms.left,
        right=one.atoms.right,
        damping=units,
        free=one.free,
        joint=joint,
        ridge=lambda_B / 3e-2 * units["left"],
    )
    assert_same_moves(direction(one, at, joint=joint, damping=3e-2, lambda_B=lambda_B), wanted)


@pytest.mark.parametrize("lambda_A", [1e-3, 0.3])
def test_ridge_of_the_adapters_enters_the_projection(lambda_A: float) -> None:
    """With A_i eliminated from the ridged problem, the part of a move that is free shrinks."""
    one = case()
    options = {"lam": 0.7, "activation": "silu", "lambda_A": lambda_A}
    at = evaluate(one.X, one.atoms.bank, one.atoms.codes, StepOptions(**options))
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, **options)
    units = damping_units(one, at, joint=True, damping=1e-2)
    wanted = reference_moves.gauss_newton(exact, one.atoms.bank, one.atoms.codes, damping=units)
    assert_same_moves(direction(one, at, joint=True, damping=1e-2), wanted)


@pytest.mark.parametrize("what", ["more atoms than experts", "equal columns of codes"])
def test_dependent_codes_use_plain_coordinates(what: str) -> None:
    one = case(n=3, m=5) if what.startswith("more") else case()
    if what.startswith("equal"):
        codes = one.atoms.codes.clone()
        codes[:, 2] = codes[:, 0]
        one = one._replace(atoms=one.atoms.with_codes(codes))
    at = evaluate(one.X, one.atoms.bank, one.atoms.codes, StepOptions(lam=0.0, activation="identity"))
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, lam=0.0, activation="identity")
    assert slopes_at(one, joint=True).triangle is None
    units = damping_units(one, at, joint=True, damping=1e-2)
    wanted = reference_moves.gauss_newton(exact, one.atoms.bank, one.atoms.codes, damping=units)
    assert_same_moves(direction(one, at, joint=True, damping=1e-2), wanted)


def test_damping_is_relative_to_the_mean_diagonal() -> None:
    one = case()
    at = evaluate(one.X, one.atoms.bank, one.atoms.codes, StepOptions(lam=0.8, activation="silu"))
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, lam=0.8, activation="silu")
    coordinates = torch.linalg.qr(one.atoms.codes).Q
    diagonal = torch.zeros(M, R, dtype=torch.float64)
    for i in range(N):
        gram = exact.adapters[i].T @ exact.adapters[i] * (exact.slopes[i] ** 2).mean()
        for j in range(M):
            diagonal[j] += coordinates[i, j] ** 2 * gram.diagonal()
    units = damping_units(one, at, joint=True, damping=0.02)
    assert units["bank"] == pytest.approx(0.02 * float(diagonal.mean()), rel=1e-10)


def test_damping_of_the_codes_is_that_of_their_normal_matrix_on_average() -> None:
    """The blocks come from a random sketch of the columns, whose mean is the exact matrix where phi is linear."""
    one = case()
    at = evaluate(one.X, one.atoms.bank, one.atoms.codes, StepOptions(lam=0.0, activation="identity"))
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, lam=0.0, activation="identity")
    K_, _ = reference_codes.code_system(exact, one.atoms.bank)
    generator = torch.Generator().manual_seed(3)
    slopes = slopes_at(one, joint=True)
    drawn = [precondition(slopes, at, damping=0.5, generator=generator).damping[-1] for _ in range(150)]
    wanted = 0.5 * float(K_.diagonal(dim1=1, dim2=2).mean())
    assert sum(drawn) / len(drawn) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("joint", [True, False])
def test_a_zero_gradient_gives_a_zero_move(joint: bool) -> None:
    one = case()
    exact = mix(one.atoms.codes, one.atoms.bank)
    X = normal(N, P, R, seed=11) @ exact
    at = evaluate(X, one.atoms.bank, one.atoms.codes, StepOptions(lam=0.0, activation="identity"))
    at = at._replace(force=torch.zeros_like(at.force))
    found = direction(one._replace(X=X), at, joint=joint, damping=1e-3)
    assert all(not bool(move.any()) for move in found.values())


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_codes_that_may_not_move_stay_whatever_the_iterations(masked: bool, low_rank: bool) -> None:
    one = case(masked=masked, low_rank=low_rank)
    at = evaluate(one.X, one.atoms.bank, one.atoms.codes, StepOptions(lam=0.5, activation="silu"))
    for iterations in (1, 4):
        found = gauss_newton_direction(
            slopes_at(one, joint=True), at, cg_iterations=iterations, damping=1e-3, generator=sketcher()
        )
        moved = found.move[-1] != 0
        assert bool(moved.any())
        if one.free is not None:
            assert not bool((moved & ~one.free).any())
