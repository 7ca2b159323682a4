"""Every part of a fit in a metric, beside the slow formulas with dense C_i, which know no root of C_i."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import reference_codes
import reference_mod
import reference_moves
import torch
from planted import configured, fitted, normal, plant, sizes_of
from small_case import (
    ENOUGH,
    Case,
    assert_same_moves,
    case,
    damping_units,
    direction,
    sketcher,
    slopes_at,
)
from torch import Tensor

from globe.am.coding import code_system
from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.preconditioner import precondition
from globe.am.dictionary.remainder import remainder
from globe.am.objective import adapters_at, error_at, evaluate
from globe.am.options import Start
from globe.am.records import StepOptions
from globe.am.start import first_atoms, spread
from globe.am.state import Atoms, Constraint, start_state
from globe.am.step import am_step
from globe.am.warm_start import truncated_svd
from globe.numerics import chunks
from globe.numerics.group import ALONE
from globe.numerics.metric import Metric, metric_of_roots, root_of, times_inverse

N, P, D, M, R = 6, 7, 9, 3, 4


def metrics(n: int = N, d: int = D, *, seed: int = 40, condition: float = 30.0) -> Tensor:
    """C_i of mean eigenvalue 1, eigenvalues down to 1/condition of the largest, in directions that are no axes."""
    turn = torch.linalg.qr(normal(n, d, d, seed=seed)).Q
    values = torch.logspace(0, -1, d, base=condition, dtype=torch.float64).expand(n, d)
    C = (turn * values.unsqueeze(1)) @ turn.mT
    return C / C.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]


def metric_for(C: Tensor) -> Metric:
    found = metric_of_roots(root_of(C))
    assert found is not None
    return found


def seen(X: Tensor, metric: Metric) -> Tensor:
    return metric.times(X, slice(0, len(X)))


def close(found: Tensor, wanted: Tensor, relative: float = 1e-9) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= relative * float(wanted.norm())


def point_of(one: Case, metric: Metric, **options: Any) -> Any:
    return evaluate(
        seen(one.X, metric), one.atoms.bank, one.atoms.codes, StepOptions(**options), metric=metric
    )


@pytest.mark.parametrize("lambda_A", [0.0, 1e-2])
@pytest.mark.parametrize(
    ("activation", "lam"), [("identity", 0.0), ("silu", 1.0), ("tanh", 0.5), ("gelu", 0.9)]
)
def test_a_point_agrees_with_the_dense_metric(activation: str, lam: float, lambda_A: float) -> None:
    one, C = case(), metrics()
    options = {"lam": lam, "activation": activation, "lambda_A": lambda_A}
    metric = metric_for(C)
    found = point_of(one, metric, **options)
    wanted = reference.point(one.X, one.atoms.bank, one.atoms.codes, C=C, **options)
    close(found.adapters, wanted.adapters)
    close(found.force, wanted.force)
    assert found.objective == pytest.approx(wanted.objective, rel=1e-10)
    kept = remainder(found, ALONE, dtype=torch.float64)
    close(kept.own, wanted.kept)
    close(kept.mean, wanted.kept.mean(dim=0))
    X = seen(one.X, metric)
    close(
        adapters_at(X, one.atoms.bank, one.atoms.codes, StepOptions(**options), metric=metric),
        wanted.adapters,
    )
    error = error_at(X, one.atoms.bank, one.atoms.codes, StepOptions(**options), metric=metric)
    residual = wanted.residual
    assert error == found.error == pytest.approx(float((residual @ C * residual).sum()), rel=1e-10)


@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("tanh", 1.0)])
def test_the_normal_equations_of_the_codes(activation: str, lam: float) -> None:
    one, C = case(), metrics()
    K, h = code_system(one.atoms.bank, point_of(one, metric_for(C), lam=lam, activation=activation))
    at = reference.point(one.X, one.atoms.bank, one.atoms.codes, lam=lam, activation=activation, C=C)
    for found, wanted in zip((K, h), reference_codes.code_system(at, one.atoms.bank), strict=True):
        close(found, wanted, 1e-8)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize(
    ("masked", "joint", "lambda_B"), [(False, True, 0.0), (True, True, 0.05), (True, False, 0.05)]
)
@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 1.0), ("tanh", 0.5)])
def test_the_direction(
    activation: str, lam: float, masked: bool, joint: bool, lambda_B: float, low_rank: bool
) -> None:
    one, C = case(masked=masked, low_rank=low_rank), metrics()
    at = point_of(one, metric_for(C), lam=lam, activation=activation)
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, lam=lam, activation=activation, C=C)
    kept = remainder(at, ALONE, dtype=torch.float64)
    units = damping_units(one, at, joint=joint, damping=3e-2, kept=kept)
    wanted = reference_moves.gauss_newton(
        exact,
        one.atoms.bank,
        one.atoms.codes,
        left=one.atoms.left,
        right=one.atoms.right,
        damping=units,
        free=one.free,
        joint=joint,
        ridge=lambda_B / 3e-2 * units["left" if low_rank else "bank"],
    )
    assert_same_moves(direction(one, at, joint=joint, damping=3e-2, lambda_B=lambda_B), wanted)


def test_damping_of_the_codes_is_that_of_their_normal_matrix_on_average() -> None:
    one, C = case(), metrics()
    at = point_of(one, metric_for(C), lam=0.0, activation="identity")
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, lam=0.0, activation="identity", C=C)
    K, _ = reference_codes.code_system(exact, one.atoms.bank)
    kept, generator = remainder(at, ALONE, dtype=torch.float64), torch.Generator().manual_seed(3)
    slopes = slopes_at(one, joint=True)
    drawn = [
        precondition(slopes, at, damping=0.5, generator=generator, kept=kept).damping[-1] for _ in range(150)
    ]
    assert sum(drawn) / len(drawn) == pytest.approx(0.5 * float(K.diagonal(dim1=1, dim2=2).mean()), rel=0.04)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 0.8)])
def test_a_blended_step(activation: str, lam: float, beta: float) -> None:
    """Towards beta X + (1 - beta) A pull, where the pull is aligned with M_i L_i and so comes with a root."""
    one, C = case(), metrics()
    metric, options = metric_for(C), {"lam": lam, "activation": activation}
    L, X = metric.roots, seen(one.X, metric)
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, C=C, **options)
    bases = reference.activate(reference.mixed(one.atoms.codes, one.atoms.bank), **options)
    warm = truncated_svd(X, R).bases
    pull = reference_mod.aligned(warm, bases @ L)
    target = beta * X + (1 - beta) * exact.adapters @ pull
    force = exact.slopes * (exact.adapters.mT @ (target - exact.adapters @ bases @ L) @ L.mT)
    state = start_state(X, one.atoms, StepOptions(**options), damping=1e-2, metric=metric)
    kept = remainder(state.point, ALONE, dtype=torch.float64)
    units = damping_units(one, state.point, joint=True, damping=1e-2, kept=kept)
    move = reference_moves.gauss_newton(exact, one.atoms.bank, one.atoms.codes, damping=units, force=force)
    new, figures = am_step(
        X, state, StepOptions(**options, beta=beta, cg_iterations=ENOUGH), warm=warm, generator=sketcher()
    )
    moved = one.atoms.moved((move["bank"], move["codes"]), Constraint(), joint=True)

    def blended(atoms: Atoms) -> float:
        M_ = reference.activate(reference.mixed(atoms.codes, atoms.bank), **options)
        return float(((target - exact.adapters @ M_ @ L) ** 2).sum())

    assert figures.accepted == (blended(moved) < blended(one.atoms))
    if figures.accepted:
        close(new.atoms.bank - one.atoms.bank, moved.bank - one.atoms.bank, 1e-7)
        close(new.atoms.codes - one.atoms.codes, moved.codes - one.atoms.codes, 1e-7)


@pytest.mark.parametrize("beta", [0.4, 1.0])
@pytest.mark.parametrize(("activation", "lam"), [("identity", 0.0), ("silu", 0.8)])
def test_a_whole_mod_step(activation: str, lam: float, beta: float) -> None:
    one, C = case(), metrics()
    metric, options = metric_for(C), {"lam": lam, "activation": activation}
    L, X = metric.roots, seen(one.X, metric)
    exact = reference.point(one.X, one.atoms.bank, one.atoms.codes, C=C, **options)
    Y = reference.mixed(one.atoms.codes, one.atoms.bank)
    bases = reference.activate(Y, **options)
    warm = truncated_svd(X, R).bases
    target = beta * reference_mod.weight_aware(X, exact.adapters, lambda_T=1e-3)
    target = (target + (1 - beta) * reference_mod.aligned(warm, bases @ L)) @ torch.linalg.inv(L)
    if lam:
        target = Y + exact.slopes * (target - bases) / (exact.slopes**2 + 0.01)
    bank = reference_mod.mod(target, one.atoms.codes, one.atoms.bank, lambda_B=1e-2)
    bank, codes = reference_mod.equal_norms(bank, one.atoms.codes)
    wanted = reference.point(one.X, bank, codes, C=C, **options)
    state = start_state(X, one.atoms, StepOptions(**options), metric=metric)
    step = StepOptions(**options, beta=beta, dictionary="mod", lambda_T=1e-3, lambda_B=1e-2)
    new, _ = am_step(X, state, step, warm=warm, generator=sketcher())
    assert new.objective == pytest.approx(wanted.objective, rel=1e-7)
    close(new.atoms.bank, bank, 1e-7)
    close(new.atoms.codes, codes, 1e-7)


def test_first_atoms_are_those_of_the_mean_metric_brought_back() -> None:
    X = plant(noise=0.2).X
    C = metrics(len(X), X.shape[2])
    metric = metric_for(C)
    mean = root_of(C.mean(dim=0))
    torch.testing.assert_close(metric.mean, C.mean(dim=0))
    torch.testing.assert_close(metric.in_mean(seen(X, metric)), X @ mean)
    for init in (Start(), Start(codes="nnls")):
        warm = truncated_svd(X @ mean, R)
        draw = torch.Generator().manual_seed(1)
        wanted = first_atoms(X @ mean, sizes_of(X), init, generator=draw, warm=warm)
        draw = torch.Generator().manual_seed(1)
        found = first_atoms(
            seen(X, metric),
            sizes_of(X),
            init,
            generator=draw,
            warm=truncated_svd(seen(X, metric), R),
            metric=metric,
        )
        back = times_inverse(wanted.bank, mean)
        close(found.codes, wanted.codes, 1e-7)
        close(found.bank / found.bank.norm(), back / back.norm(), 1e-7)
        assert spread(found.codes, found.bank) == pytest.approx(init.scale)


def test_chunks_of_experts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    X = plant(noise=0.2).X
    metric = metric_for(metrics(len(X), X.shape[2]))
    config = configured(steps=5, cg_iterations=5, activation="silu", lam=1.0)
    whole, _ = fitted(seen(X, metric), sizes_of(X), config, metric=metric)
    monkeypatch.setattr(chunks, "CHUNK_NUMBERS", 1)
    parts, _ = fitted(seen(X, metric), sizes_of(X), config, metric=metric)
    assert parts.relfrob == pytest.approx(whole.relfrob, rel=1e-8)


@pytest.mark.parametrize("inner", [torch.float32, torch.bfloat16])
def test_a_spent_point_gives_the_same_move(inner: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("globe.am.objective._WORTH_RELEASING", 1)
    one, metric = case(), metric_for(metrics().float())
    X = seen(one.X.float(), metric)
    atoms = Atoms(one.atoms.bank.float(), one.atoms.codes.float())
    moves = []
    for spend in (False, True):
        at = evaluate(X, atoms.bank, atoms.codes, StepOptions(lam=1.0, activation="tanh"), metric=metric)
        found = gauss_newton_direction(
            slopes_at(Case(X, atoms, None), joint=True),
            at,
            cg_iterations=5,
            damping=1e-3,
            generator=sketcher(),
            curvature_dtype=inner,
            spend=spend,
        )
        moves.append(found.move)
        assert all((part.untyped_storage().nbytes() == 0) == spend for part in (at.force, at.rows))
    assert all(torch.equal(one, other) for one, other in zip(*moves, strict=True))


def test_bfloat16_products_point_the_same_way() -> None:
    one, metric = case(n=11), metric_for(metrics(11).float())
    X, atoms = seen(one.X.float(), metric), Atoms(one.atoms.bank.float(), one.atoms.codes.float())
    at = evaluate(X, atoms.bank, atoms.codes, StepOptions(lam=1.0, activation="tanh"), metric=metric)
    moves = [
        gauss_newton_direction(
            slopes_at(Case(X, atoms, None), joint=True),
            at,
            cg_iterations=4,
            damping=1e-2,
            generator=sketcher(),
            curvature_dtype=inner,
        )
        .move[0]
        .flatten()
        for inner in (torch.float32, torch.bfloat16)
    ]
    # an angle of 0.14, where four products of unit roundoff 2^-8 give 0.011 under every arithmetic
    assert float(torch.cosine_similarity(*moves, dim=0)) > 0.99
