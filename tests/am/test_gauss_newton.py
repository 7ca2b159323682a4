"""The projected Gauss-Newton direction against a direct solve of its dense normal matrix, for every option."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import reference
import torch
from planted import normal
from torch import Tensor

from globe.am.dictionary import curvature
from globe.am.dictionary.curvature import Curvature
from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.preconditioner import precondition
from globe.am.dictionary.remainder import Remainder
from globe.am.dictionary.tangent import Tangent, tangent
from globe.am.objective import Point, evaluate, mix
from globe.am.records import StepOptions
from globe.am.state import Atoms, Constraint, low_rank_atoms, start_state
from globe.am.step import am_step
from globe.am.warm_start import truncated_svd
from globe.numerics import chunks

N, P, D, M, R, K = 6, 7, 9, 3, 4, 2
ENOUGH = 1500
"""conjugate-gradient iterations that solve these systems to rounding"""


class Case(NamedTuple):
    X: Tensor
    atoms: Atoms
    free: Tensor | None


def case(*, n: int = N, m: int = M, low_rank: bool = False, masked: bool = False, seed: int = 0) -> Case:
    X, codes = normal(n, P, D, seed=seed), 0.2 + normal(n, m, seed=seed + 1).abs()
    free = None
    if masked:
        free = normal(n, m, seed=seed + 2) > -0.3
        free[:, 0] |= ~free.any(dim=1)
        codes = codes * free
    if low_rank:
        atoms = low_rank_atoms(normal(m, R, K, seed=seed + 3), normal(m, K, D, seed=seed + 4), codes)
    else:
        atoms = Atoms(normal(m, R, D, seed=seed + 3), codes)
    return Case(X, atoms, free)


def sketcher() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def slopes_at(one: Case, *, joint: bool) -> Tangent:
    atoms = one.atoms
    return tangent(atoms.bank, atoms.codes, left=atoms.left, right=atoms.right, free=one.free, joint=joint)


def direction(
    one: Case, at: Point, *, joint: bool, damping: float, lambda_B: float = 0.0, force: Tensor | None = None
) -> dict[str, Tensor]:
    """The fast path's move, by name, in plain atoms."""
    found = gauss_newton_direction(
        slopes_at(one, joint=joint),
        at,
        cg_iterations=ENOUGH,
        damping=damping,
        generator=sketcher(),
        lambda_B=lambda_B,
        force=force,
    )
    names = ("bank",) if one.atoms.left is None else ("left", "right")
    return dict(zip((*names, "codes") if joint else names, found.move, strict=True))


def damping_units(
    one: Case, at: Point, *, joint: bool, damping: float, kept: Remainder | None = None
) -> dict[str, float]:
    slopes = slopes_at(one, joint=joint)
    scales = precondition(slopes, at, damping=damping, generator=sketcher(), kept=kept).damping
    names = ("bank",) if one.atoms.left is None else ("left", "right")
    return dict(zip((*names, "codes") if joint else names, scales, strict=True))


def assert_same_moves(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, move in wanted.items():
        scale = float(move.norm())
        assert scale > 0, name
        assert float((found[name] - move).norm()) <= relative * scale, name


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
    wanted = reference.gauss_newton(
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
    wanted = reference.gauss_newton(
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
    wanted = reference.gauss_newton(exact, one.atoms.bank, one.atoms.codes, damping=units)
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
    wanted = reference.gauss_newton(exact, one.atoms.bank, one.atoms.codes, damping=units)
    assert_same_moves(direction(one, at, joint=True, damping=1e-2), wanted)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 0.8)])
def test_blended_target(activation: str, lam: float, beta: float) -> None:
    """The step towards beta X + (1 - beta) A pull, with the curvature of the true objective."""
    one = case()
    options = {"lam": lam, "activation": activation}
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, **options)
    M_ = reference.activate(reference.mixed(one.atoms.codes, one.atoms.bank), **options)
    warm = truncated_svd(one.X, R).bases
    pull = reference.aligned(warm, M_)
    target = beta * one.X + (1 - beta) * exact.adapters @ pull
    force = exact.slopes * (exact.adapters.mT @ (target - exact.adapters @ M_))
    state = start_state(one.X, one.atoms, StepOptions(**options), damping=1e-2)
    units = damping_units(one, state.point, joint=True, damping=1e-2)
    wanted = reference.gauss_newton(exact, one.atoms.bank, one.atoms.codes, damping=units, force=force)

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
    K_, _ = reference.code_system(exact, one.atoms.bank)
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


@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 1.0)])
def test_a_whole_step_is_the_reference_step(activation: str, lam: float) -> None:
    """Without extrapolation: direction, codes clamped at zero, refit."""
    one = case(seed=20)
    options = {"lam": lam, "activation": activation}
    state = start_state(one.X, one.atoms, StepOptions(**options), damping=0.1)
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, **options)
    units = damping_units(one, state.point, joint=True, damping=0.1)
    move = reference.gauss_newton(exact, one.atoms.bank, one.atoms.codes, damping=units)
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
    target = beta * reference.weight_aware(one.X, exact.adapters, lambda_T=1e-3)
    target = target + (1 - beta) * reference.aligned(warm, M_)
    if lam:
        target = Y + exact.slopes * (target - M_) / (exact.slopes**2 + 0.01)
    bank = reference.mod(target, codes, atoms.bank, lambda_B=1e-2)
    if not simplex:
        bank, codes = reference.equal_norms(bank, codes)
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


@pytest.mark.parametrize("inner", [torch.float32, torch.bfloat16])
def test_a_spent_point_gives_the_same_move_and_its_memory_back(
    inner: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("globe.am.objective._WORTH_RELEASING", 1)
    one = case()
    X = one.X.float()
    atoms = Atoms(one.atoms.bank.float(), one.atoms.codes.float())
    moves = []
    for spend in (False, True):
        at = evaluate(X, atoms.bank, atoms.codes, StepOptions(lam=1.0, activation="tanh"))
        found = gauss_newton_direction(
            tangent(atoms.bank, atoms.codes),
            at,
            cg_iterations=5,
            damping=1e-3,
            generator=sketcher(),
            curvature_dtype=inner,
            spend=spend,
        )
        moves.append(found.move)
        copied = () if inner == torch.float32 else (at.rows, at.slope, at.gram)
        left = [part.untyped_storage().nbytes() for part in (at.force, at.adapters, *copied)]
        assert all((size == 0) == spend for size in left)
    assert all(torch.equal(one, other) for one, other in zip(*moves, strict=True))


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_product_in_chunks_and_parts_is_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, activation: str
) -> None:
    """Chunks of experts, a few of a chunk at a time, and sums of lower-precision products piece by piece."""
    one = case(n=11)
    at = evaluate(one.X, one.atoms.bank, one.atoms.codes, StepOptions(lam=1.0, activation=activation))
    move = (normal(M, R, D, seed=8), normal(11, M, seed=9))
    whole = [part.clone() for part in Curvature(slopes_at(one, joint=True), at, dtype=dtype).product(move)]
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", 1)
    monkeypatch.setattr(curvature, "_IN_CACHE", 1)
    monkeypatch.setattr(curvature, "_PIECE", 5)
    parts = Curvature(slopes_at(one, joint=True), at, dtype=dtype).product(move)
    enough = 1e-11 if dtype is torch.float64 else 1e-5
    for found, wanted in zip(parts, whole, strict=True):
        assert float((found - wanted).abs().max()) < enough * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("count", "numbers"), [(1, 10**9), (2, 10**9), (15, 10**9), (20, 88 * 256), (15, 300_000)]
)
def test_parts_of_a_chunk_hold_two_experts_or_all_there_are(count: int, numbers: int) -> None:
    parts = [range(count)[part] for part in curvature._few_experts(count, numbers)]
    assert [at for part in parts for at in part] == list(range(count))
    assert min(map(len, parts)) >= min(2, count)
