"""Activation, refit, the point, MOD and targets, each beside its slow formula."""

from __future__ import annotations

import pytest
import reference
import reference_mod
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import normal, plant
from torch import Tensor

from globe.am.dictionary.mod import linearised_targets, mod_step, rescale_gauge
from globe.am.dictionary.targets import aligned_warm_start, blend, weight_aware_targets
from globe.am.objective import adapters_at, evaluate, mix, release
from globe.am.records import StepOptions
from globe.am.refit import damped_cholesky, refit
from globe.am.warm_start import truncated_svd
from globe.errors import FitError
from globe.numerics.activation import phi, phi_prime

N, P, D, M, R = 6, 7, 9, 3, 4
ACTIVATIONS = ("identity", "silu", "tanh", "gelu")
LAMS = (0.0, 0.3, 1.0)


def close(found: Tensor, wanted: Tensor, relative: float = 1e-8) -> None:
    """Relative to the whole tensor, since single entries may be near zero."""
    assert found.shape == wanted.shape
    error = float(torch.linalg.vector_norm(found - wanted))
    assert error <= relative * float(torch.linalg.vector_norm(wanted)), error


def bank_and_codes(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return normal(N, P, D, seed=seed), normal(M, R, D, seed=seed + 1), normal(N, M, seed=seed + 2).abs()


@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_its_slope(activation: str, lam: float) -> None:
    Y = 3 * normal(R, D, seed=0)
    image = phi(Y, lam=lam, activation=activation)
    close(image, reference.activate(Y, lam=lam, activation=activation), 1e-14)
    wanted = reference.slope(Y, lam=lam, activation=activation)
    for at_hand in (None, image):
        found = phi_prime(Y, lam=lam, activation=activation, image=at_hand)
        if found is None:
            assert lam == 0 or activation == "identity"
            found = torch.ones_like(Y)
        close(found, wanted, 1e-13)


def test_unknown_activation_is_refused() -> None:
    for function in (phi, phi_prime):
        with pytest.raises(ValueError, match="activation 'relu' is not one of identity, silu, tanh, gelu"):
            function(normal(R, D, seed=0), lam=1.0, activation="relu")


@pytest.mark.parametrize("lambda_A", [0.0, 1e-3, 0.5])
def test_refit_is_the_least_squares_solution(lambda_A: float) -> None:
    X, bank, codes = bank_and_codes()
    wanted = reference.point(X, bank, codes, lam=0.0, activation="identity", lambda_A=lambda_A)
    found = refit(X, reference.mixed(codes, bank), lambda_A=lambda_A)
    close(found.adapters, wanted.adapters)
    close(found.rows.mT @ found.rows, wanted.projectors)
    assert found.regularised == 0


@pytest.mark.parametrize("lambda_A", [0.0, 1e-2])
@pytest.mark.parametrize("lam", LAMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_point_agrees_with_the_reference(activation: str, lam: float, lambda_A: float) -> None:
    X, bank, codes = bank_and_codes()
    options = {"lam": lam, "activation": activation, "lambda_A": lambda_A}
    wanted, found = (
        reference.point(X, bank, codes, **options),
        evaluate(X, bank, codes, StepOptions(**options)),
    )
    close(found.adapters, wanted.adapters)
    close(found.gram, wanted.adapters.mT @ wanted.adapters)
    close(found.rows.mT @ found.rows, wanted.projectors)
    close(found.force, wanted.force)
    close(found.errors, (wanted.residual**2).sum(dim=(1, 2)))
    assert found.error == pytest.approx(float((wanted.residual**2).sum()), rel=1e-10)
    assert found.objective == pytest.approx(wanted.objective, rel=1e-10)
    linear = lam == 0 or activation == "identity"
    assert (found.slope is None) == linear
    if found.slope is not None:
        close(found.slope, wanted.slopes)


@pytest.mark.parametrize("lambda_A", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("lam", [0.4, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_force_is_minus_half_the_gradient_of_the_reduced_objective(
    activation: str, lam: float, lambda_A: float
) -> None:
    """The adapters follow Y, and still the gradient is that at fixed adapters (variable projection)."""
    X, bank, codes = bank_and_codes()
    Y = mix(codes, bank).requires_grad_()
    options = {"lam": lam, "activation": activation, "lambda_A": lambda_A}
    objective = reference.reduced_objective(X, Y, **options)
    (gradient,) = torch.autograd.grad(objective, Y)
    found = evaluate(X, bank, codes, StepOptions(**options))
    assert found.objective == pytest.approx(objective.item(), rel=1e-10)
    close(found.force, -gradient / 2)


def test_mixed_bases_are_the_sums() -> None:
    _, bank, codes = bank_and_codes()
    close(mix(codes, bank), reference.mixed(codes, bank), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_bases_are_refitted_and_counted(dtype: torch.dtype) -> None:
    """Expert 1 has two equal rows, expert 3 none at all but zeros; the rest are as good as ever."""
    X, bank, codes = (t.to(dtype) for t in bank_and_codes())
    bases = mix(codes, bank)
    bases[1, 2] = bases[1, 0] * (1 + 4e-4 * torch.finfo(dtype).eps ** 0.5)
    bases[3] = 0
    found = refit(X, bases)
    assert bool(torch.isfinite(found.adapters).all())
    assert not bool(found.adapters[3].any())
    # the row space of expert 1 is still fitted: no better than the exact projection, and nearly as good
    wide, basis = X[1].double(), bases[1].double()
    exact = wide - wide @ torch.linalg.pinv(basis, rtol=1e-6) @ basis
    error = torch.linalg.vector_norm((X[1] - found.adapters[1] @ bases[1]).double())
    best = torch.linalg.vector_norm(exact)
    assert best * (1 - 1e-3) <= error <= best * (1 + 1e-2)
    others = refit(X[[0, 2, 4, 5]], bases[[0, 2, 4, 5]])
    close(found.adapters[[0, 2, 4, 5]], others.adapters, 1e-5 if dtype == torch.float32 else 1e-12)


def test_cholesky_raises_the_ridge_of_those_that_need_it() -> None:
    good = normal(R, R, seed=0)
    good = good @ good.T
    direction = normal(R, seed=1)
    broken = torch.outer(direction, direction) - 1e-5 * direction.square().sum() * torch.eye(R).double() / R
    S = torch.stack([good, broken, torch.zeros(R, R).double(), good])
    factor = damped_cholesky(S, ridge=1e-12)
    means = S.diagonal(dim1=1, dim2=2).mean(dim=1)
    eye = torch.eye(R, dtype=torch.float64)
    rebuilt = factor @ factor.mT
    for i in (0, 3):
        close(rebuilt[i], S[i] + 1e-12 * means[i] * eye, 1e-14)
    close(rebuilt[2], 1e-12 * eye, 1e-14)
    ridge = float((rebuilt[1] - S[1]).diagonal().mean() / means[1])
    assert ridge == pytest.approx(1e-5, rel=1e-6) or ridge == pytest.approx(1e-4, rel=1e-6)
    close(rebuilt[1], S[1] + ridge * means[1] * eye, 1e-12)


def test_cholesky_survives_all_but_numbers_that_are_not_finite() -> None:
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0]).double())[None]
    factor = damped_cholesky(indefinite, ridge=1e-12)
    close(factor @ factor.mT, indefinite + 5 * torch.eye(4).double()[None], 1e-12)
    with pytest.raises(FitError, match="no longer finite: check the weights for NaN"):
        damped_cholesky(torch.full((1, R, R), torch.nan), ridge=1e-7)


@pytest.mark.parametrize("lambda_B", [1e-14, 1e-3, 0.5])
def test_mod_is_the_least_squares_bank(lambda_B: float) -> None:
    _, bank, codes = bank_and_codes()
    targets = normal(N, R, D, seed=9)
    close(
        mod_step(targets, codes, bank, lambda_B=lambda_B),
        reference_mod.mod(targets, codes, bank, lambda_B=lambda_B),
    )


def test_mod_leaves_an_atom_that_nobody_uses() -> None:
    _, bank, codes = bank_and_codes()
    codes[:, 1] = 0
    found = mod_step(normal(N, R, D, seed=9), codes, bank)
    close(found[1], bank[1], 1e-12)
    assert float((found[0] - bank[0]).abs().max()) > 0.1


def test_mod_on_orthonormal_adapters_is_the_exact_minimiser_and_elsewhere_not() -> None:
    """argmin over B of sum_i ||X_i - A_i sum_j alpha_ij B_j||^2 at fixed A, from the dense Jacobian."""
    X, bank, codes = bank_and_codes()
    orthonormal = torch.linalg.qr(normal(N, P, R, seed=5)).Q

    def exact(A: Tensor) -> Tensor:
        columns = [
            torch.cat([(codes[i, j] * A[i])[:, a] for i in range(N)]) for j in range(M) for a in range(R)
        ]
        # all columns of X share the Jacobian
        return reference.least_squares(torch.stack(columns, dim=1), X.flatten(0, 1)).view(M, R, D)

    found = mod_step(weight_aware_targets(X, orthonormal), codes, bank)
    close(found, exact(orthonormal))
    skewed = orthonormal @ normal(N, R, R, seed=6)
    found = mod_step(weight_aware_targets(X, skewed), codes, bank)
    assert float((found - exact(skewed)).norm() / exact(skewed).norm()) > 1e-2


@pytest.mark.parametrize("lambda_T", [0.0, 1e-2])
def test_weight_aware_targets(lambda_T: float) -> None:
    X, A = normal(N, P, D, seed=0), normal(N, P, R, seed=1)
    close(
        weight_aware_targets(X, A, lambda_T=lambda_T),
        reference_mod.weight_aware(X, A, lambda_T=lambda_T),
        1e-9,
    )


def test_aligned_warm_start_is_the_procrustes_rotation_at_the_bases_size() -> None:
    X, bank, codes = bank_and_codes()
    warm, bases = truncated_svd(X, R).bases, mix(codes, bank)
    found = aligned_warm_start(warm, bases)
    close(found, reference_mod.aligned(warm, bases), 1e-10)
    before = torch.linalg.vector_norm(warm - bases / bases.norm() * warm.norm())
    assert float(torch.linalg.vector_norm(found - bases)) < float(before) * float(bases.norm() / warm.norm())


def test_blend_goes_from_warm_to_weight_aware() -> None:
    weight_aware, warm = normal(N, R, D, seed=0), normal(N, R, D, seed=1)
    assert torch.equal(blend(1.0, weight_aware, None), weight_aware)
    assert torch.equal(blend(0.0, weight_aware, warm), warm)
    close(blend(0.25, weight_aware, warm), 0.75 * warm + 0.25 * weight_aware, 1e-14)


def test_linearised_targets() -> None:
    Y, T = normal(N, R, D, seed=0), normal(N, R, D, seed=1)
    base, J = (function(Y, lam=0.8, activation="silu") for function in (phi, phi_prime))
    assert J is not None
    assert torch.equal(linearised_targets(Y, Y, None, T), T)
    found = linearised_targets(Y, base, J, T)
    entry = (2, 1, 5)
    step = J[entry] * (T[entry] - base[entry]) / (J[entry] ** 2 + 0.01)
    assert float(found[entry]) == pytest.approx(float(Y[entry] + step), rel=1e-13)
    # where phi is flat the target must not run away
    flat = linearised_targets(Y, base, torch.zeros_like(J), T)
    assert torch.equal(flat, Y)


@given(st.integers(0, 2**31), st.booleans())
def test_rescaling_the_gauge_changes_no_mixed_basis(seed: int, with_a_zero_atom: bool) -> None:
    bank, codes = normal(M, R, D, seed=seed), normal(N, M, seed=seed + 1).abs()
    bank *= torch.tensor([1e-3, 1.0, 40.0]).double()[:, None, None]
    if with_a_zero_atom:
        bank[1] = 0
    found, wanted = rescale_gauge(bank, codes), reference_mod.equal_norms(bank, codes)
    close(found.bank, wanted[0], 1e-13)
    close(found.codes, wanted[1], 1e-13)
    close(mix(found.codes, found.bank), mix(codes, bank), 1e-13)
    norms = torch.linalg.vector_norm(found.bank, dim=(1, 2))
    used = torch.tensor([True, not with_a_zero_atom, True])
    assert float(norms[used].max() / norms[used].min()) == pytest.approx(1.0, abs=1e-12)
    assert with_a_zero_atom == (not bool(found.bank[1].any()))


def test_errors_are_of_the_residual_and_not_of_cancelling_norms() -> None:
    """A float32 fit at RelFrob 1e-5: |X|^2 - 2 <X, Xhat> + |Xhat|^2 would have no correct digit left."""
    problem = plant(N, P, D, M, R, noise=1e-5, dtype=torch.float32)
    found = evaluate(problem.X, problem.bank, problem.codes, StepOptions(lam=0.0, activation="identity"))
    wanted = reference.point(
        *(t.double() for t in (problem.X, problem.bank, problem.codes)), lam=0.0, activation="identity"
    )
    assert found.error == pytest.approx(float((wanted.residual**2).sum()), rel=2e-2)


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_released_memory_is_taken_again_with_the_same_bits(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("globe.am.objective._WORTH_RELEASING", 1)
    X, bank, codes = bank_and_codes()
    options = {"lam": 1.0, "activation": activation, "lambda_A": 1e-3}
    wanted, spent = (
        evaluate(X, bank, codes, StepOptions(**options)),
        evaluate(X, bank + 1, codes, StepOptions(**options)),
    )
    release(spent.gram, spent.rows, spent.slope)
    assert spent.rows.untyped_storage().nbytes() == 0
    found = evaluate(X, bank, codes, StepOptions(**options), into=spent._replace(adapters=None))
    assert found.rows is spent.rows
    for name in ("gram", "rows", "slope", "force", "errors"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is other is None) or torch.equal(one, other), name
    assert found.objective == wanted.objective
    assert found.adapters is None
    assert torch.equal(adapters_at(X, bank, codes, StepOptions(**options)), wanted.adapters)


@pytest.mark.parametrize("dependence", [1e-2, 1e-4, 1e-6, 0.0])
def test_rows_stay_orthonormal_whatever_the_condition_of_the_basis(dependence: float) -> None:
    """In float32, where the square of the condition number is lost below 1e-4 of dependence.

    Rows longer than one would make I - Q^T Q indefinite, which no ridge of the preconditioner could mend.
    """
    X, bank, codes = bank_and_codes()
    M = reference.mixed(codes, bank)
    M[:, 2] = M[:, 0] + M[:, 1] + dependence * M[:, 2]
    found = refit(X.float(), M.float(), lambda_A=1e-7)
    wanted = refit(X, M.float().double(), lambda_A=1e-7)
    close(found.rows.double().mT @ found.rows.double(), wanted.rows.mT @ wanted.rows, 1e-2)
    assert float(torch.linalg.matrix_norm(found.rows, ord=2).max()) < 1 + 1e-3
    left = torch.linalg.vector_norm(X - found.adapters.double() @ M)
    assert float(left) == pytest.approx(float(torch.linalg.vector_norm(X - wanted.adapters @ M)), rel=1e-3)
    assert (found.regularised, wanted.regularised) == (0 if dependence == 1e-2 else N, 0)
