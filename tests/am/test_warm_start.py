"""Closed-form beginnings against slow references: SVD, gauge, inverse code maps, non-negative least
squares.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from entmax import entmax15, sparsemax
from hypothesis import given
from hypothesis import strategies as st

from globe.am.nnls import logits_from_codes, nnls_codes
from globe.am.warm_start import align, procrustes, right_basis, truncated_svd
from globe.errors import FitError

N, P, D, R, M = 6, 5, 9, 3, 4


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_orthonormal(rows: torch.Tensor, atol: float = 1e-12) -> None:
    eye = torch.eye(rows.shape[-2], dtype=rows.dtype).expand(*rows.shape[:-1], rows.shape[-2])
    torch.testing.assert_close(rows @ rows.mT, eye, rtol=0, atol=atol)


# truncated SVD


@pytest.mark.parametrize("shape", [(P, D), (D, P)], ids=["wide", "tall"])
def test_svd_equals_the_textbook_one(shape: tuple[int, int]) -> None:
    X = gaussian(N, *shape)
    A0, B0 = truncated_svd(X, R)
    assert A0.shape == (N, shape[0], R)
    assert B0.shape == (N, R, shape[1])
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    best = U[:, :, :R] * S[:, None, :R] @ Vh[:, :R]
    torch.testing.assert_close(A0 @ B0, best, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.vector_norm(A0, dim=1), S[:, :R], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        (B0 * Vh[:, :R]).sum(dim=2).abs(), torch.ones(N, R).double(), rtol=1e-12, atol=0
    )
    assert_orthonormal(B0)


@pytest.mark.parametrize("shape", [(P, D), (D, P)], ids=["wide", "tall"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_full_rank_is_lossless(shape: tuple[int, int], dtype: torch.dtype, atol: float) -> None:
    X = gaussian(N, *shape, dtype=dtype)
    A0, B0 = truncated_svd(X, min(shape))
    assert A0.dtype == B0.dtype == dtype
    torch.testing.assert_close(A0 @ B0, X, rtol=0, atol=atol)
    assert_orthonormal(B0, atol)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("shape", [(P, D), (D, P)], ids=["wide", "tall"])
def test_rank_below_r_still_gives_orthonormal_rows_and_loses_nothing(
    rank: int, shape: tuple[int, int]
) -> None:
    X = gaussian(N, shape[0], rank) @ gaussian(N, rank, shape[1], seed=1)
    A0, B0 = truncated_svd(X, R)
    assert_orthonormal(B0)
    torch.testing.assert_close(A0 @ B0, X, rtol=0, atol=1e-12)


@given(st.integers(0, 2**31), st.floats(0, 14))
def test_basis_is_orthonormal_whatever_the_spectrum(seed: int, decades: float) -> None:
    spectrum = torch.logspace(0, -decades, P, dtype=torch.float64)
    left, right = right_basis(gaussian(P, P, seed=seed), P), right_basis(gaussian(P, D, seed=seed + 1), P)
    X = (left * spectrum) @ right
    for r in (R, P):
        basis = right_basis(X, r)
        assert_orthonormal(basis)
        missed = float((X - X @ basis.mT @ basis).norm())
        assert missed <= float(spectrum[r:].norm()) * (1 + 1e-9) + 1e-13


def test_signs_are_fixed_so_that_a_basis_does_not_depend_on_the_sign_of_the_matrix() -> None:
    X = gaussian(P, D)
    basis = right_basis(X, R)
    torch.testing.assert_close(right_basis(-X, R), basis, rtol=0, atol=1e-12)
    assert bool((basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize("r", [0, P + 1])
def test_impossible_rank_is_refused(r: int) -> None:
    with pytest.raises(ValueError, match=rf"r={r} is not between 1 and {P}"):
        truncated_svd(gaussian(N, P, D), r)


# gauge


@given(st.integers(0, 2**31))
def test_procrustes_undoes_a_planted_rotation(seed: int) -> None:
    target = gaussian(N, R, D, seed=seed)
    turn = torch.linalg.qr(gaussian(N, R, R, seed=seed + 1)).Q
    torch.testing.assert_close(align(turn @ target, target), target, rtol=0, atol=1e-11)
    torch.testing.assert_close(procrustes(turn @ target, target), turn.mT, rtol=0, atol=1e-9)


def test_procrustes_beats_every_other_rotation_tried() -> None:
    bases, target = gaussian(N, R, D), gaussian(N, R, D, seed=1)
    Q = procrustes(bases, target)
    assert_orthonormal(Q)
    best = (Q @ bases - target).pow(2).sum(dim=(1, 2))
    for seed in range(200):
        other = torch.linalg.qr(gaussian(N, R, R, seed=seed)).Q
        assert bool((best <= (other @ bases - target).pow(2).sum(dim=(1, 2)) + 1e-12).all())


def test_procrustes_with_a_zero_target_is_still_a_rotation() -> None:
    assert_orthonormal(procrustes(gaussian(N, R, D), torch.zeros(N, R, D, dtype=torch.float64)))


# inverse code maps

MAPS = {"entmax15": entmax15, "sparsemax": sparsemax}


@pytest.mark.parametrize("code_map", MAPS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 7.0])
@pytest.mark.parametrize("m", [1, M, 200])
def test_logits_give_the_codes_back_with_their_support(
    code_map: str, dtype: torch.dtype, atol: float, temperature: float, m: int
) -> None:
    codes = gaussian(50, m).clamp_min(0) * torch.logspace(-2, 2, 50, dtype=torch.float64)[:, None]
    codes[:, 0] += 0.01
    codes = codes.to(dtype)
    z, gains = logits_from_codes(codes, code_map=code_map, temperature=temperature)
    p = MAPS[code_map](z / temperature, dim=1)
    torch.testing.assert_close(gains, codes.sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(p, codes / gains[:, None], rtol=0, atol=atol)
    assert torch.equal(p > 0, codes > 0)


def test_logits_of_a_row_without_codes() -> None:
    z, gains = logits_from_codes(torch.zeros(2, M), code_map="entmax15")
    assert bool((gains == 0).all())
    assert bool(torch.isfinite(z).all())
    assert float(z.max() - z.min()) == 0
    with pytest.raises(ValueError, match=r"codes.map='softmax'"):
        logits_from_codes(torch.ones(2, M), code_map="softmax")


# non-negative least squares


def slow_nnls(
    gram: np.ndarray, right: np.ndarray, simplex: bool = False, allowed: tuple[int, ...] | None = None
) -> tuple[np.ndarray, float]:
    """The best of all supports, each solved as an equality problem: correct, and exponential in m."""
    m = len(right)
    best, lowest = np.zeros(m), math.inf if simplex else 0.0
    allowed = tuple(range(m)) if allowed is None else allowed
    for size in range(1, len(allowed) + 1):
        for chosen in itertools.combinations(allowed, size):
            part = np.ix_(chosen, chosen)
            if simplex:
                system = np.zeros((size + 1, size + 1))
                system[:size, :size], system[size, :size], system[:size, size] = gram[part], 1, 1
                x = np.linalg.lstsq(system, np.append(right[list(chosen)], 1), rcond=None)[0][:size]
            else:
                x = np.linalg.lstsq(gram[part], right[list(chosen)], rcond=None)[0]
            if x.min() < -1e-12:
                continue
            value = 0.5 * x @ gram[part] @ x - right[list(chosen)] @ x
            if value < lowest - 1e-14:
                lowest, best = value, np.zeros(m)
                best[list(chosen)] = x
    return best, lowest


def problem(seed: int, rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    atoms, targets = gaussian(M, rows, seed=seed), gaussian(N, rows, seed=seed + 1)
    return atoms @ atoms.mT, targets @ atoms.mT


@given(st.integers(0, 2**31), st.booleans())
def test_nnls_equals_the_search_over_all_supports(seed: int, simplex: bool) -> None:
    gram, rights = problem(seed)
    codes = nnls_codes(gram, rights, simplex=simplex).numpy()
    for i in range(N):
        expected, _ = slow_nnls(gram.numpy(), rights[i].numpy(), simplex)
        np.testing.assert_allclose(codes[i], expected, atol=1e-6 if simplex else 1e-10)


@given(st.integers(0, 2**31), st.booleans())
def test_nnls_meets_the_optimality_conditions(seed: int, simplex: bool) -> None:
    gram, rights = problem(seed)
    codes = nnls_codes(gram, rights, simplex=simplex)
    slope = codes @ gram - rights
    if simplex:
        torch.testing.assert_close(codes.sum(1), torch.ones(N).double(), rtol=1e-12, atol=0)
        slope = slope - (slope * codes).sum(1, keepdim=True)
    assert bool((codes >= 0).all())
    assert float(slope.min()) >= -1e-5
    assert float((slope * codes).abs().max()) <= 1e-5


def test_planted_codes_are_found() -> None:
    atoms = gaussian(M, 12)
    planted = gaussian(N, M, seed=3).clamp_min(0)
    codes = nnls_codes(atoms @ atoms.mT, planted @ atoms @ atoms.mT)
    torch.testing.assert_close(codes, planted, rtol=0, atol=1e-12)


def test_one_gram_matrix_per_expert() -> None:
    problems = [problem(seed) for seed in range(N)]
    grams = torch.stack([gram for gram, _ in problems])
    rights = torch.stack([right[i] for i, (_, right) in enumerate(problems)])
    codes = nnls_codes(grams, rights)
    for i in range(N):
        alone = nnls_codes(grams[i], rights[i : i + 1])[0]
        torch.testing.assert_close(codes[i], alone, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(codes, nnls_codes(grams[0], rights))


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_support_is_respected_and_the_values_on_it_are_optimal(seed: int, simplex: bool, each: bool) -> None:
    gram, rights = problem(seed)
    support = gaussian(N, M, seed=seed + 7) > 0.3
    support[torch.arange(N), torch.arange(N) % M] = True
    grams = gram.expand(N, M, M) if each else gram
    codes = nnls_codes(grams, rights, simplex=simplex, support=support)
    assert bool((codes[~support] == 0).all())
    for i in range(N):
        allowed = tuple(support[i].nonzero()[:, 0].tolist())
        expected, _ = slow_nnls(gram.numpy(), rights[i].numpy(), simplex, allowed)
        np.testing.assert_allclose(codes[i].numpy(), expected, atol=1e-6 if simplex else 1e-10)


@pytest.mark.parametrize("spread", [1e-3, 1e-6, 1e-9, 0.0])
def test_nearly_parallel_and_equal_atoms(spread: float) -> None:
    """The residual, not the codes, is what must be right: they trade between twins freely."""
    atoms = gaussian(1, 12) + spread * gaussian(M, 12, seed=1)
    targets = gaussian(N, 12, seed=2) + 2 * atoms[:1]
    codes = nnls_codes(atoms @ atoms.mT, targets @ atoms.mT)
    from scipy.optimize import nnls

    for i in range(N):
        residual = float((targets[i] - codes[i] @ atoms).norm())
        assert residual <= nnls(atoms.numpy().T, targets[i].numpy())[1] + 1e-6


@given(st.integers(0, 2**31), st.booleans())
def test_answer_does_not_depend_on_the_size_of_the_atoms(seed: int, simplex: bool) -> None:
    gram, rights = problem(seed)
    norms = torch.tensor([1e-6, 1.0, 1e4, 30.0], dtype=torch.float64)
    if simplex:
        norms = torch.full((M,), 1e-5, dtype=torch.float64)
    scaled = nnls_codes(
        gram * norms[:, None] * norms, rights * norms * (norms[0] if simplex else 1), simplex=simplex
    )
    plain = nnls_codes(gram, rights, simplex=simplex)
    torch.testing.assert_close(scaled * (1 if simplex else norms), plain, rtol=0, atol=1e-6)


def test_a_simplex_holds_when_the_target_is_far_larger_than_the_atoms() -> None:
    gram, rights = problem(5)
    codes = nnls_codes(gram, 1e6 * rights, simplex=True)
    for i in range(N):
        assert float(codes[i].max()) == pytest.approx(1.0, abs=1e-4)
        assert int(codes[i].argmax()) == int(rights[i].argmax())


def test_a_zero_atom_gets_no_code() -> None:
    atoms = gaussian(M, 12)
    atoms[2] = 0
    codes = nnls_codes(atoms @ atoms.mT, gaussian(N, 12, seed=1) @ atoms.mT)
    assert bool((codes[:, 2] == 0).all())
    assert float(codes.max()) > 0


def test_a_single_atom_and_the_dtype_of_the_right_hand_side() -> None:
    codes = nnls_codes(torch.tensor([[4.0]]), torch.tensor([[2.0], [-1.0]]))
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes, torch.tensor([[0.5], [0.0]]))


def test_an_active_set_that_does_not_end_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.optimize

    def cycles(*_: object, **__: object) -> None:
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr(scipy.optimize, "nnls", cycles)
    with pytest.raises(FitError, match=r"did not settle .*raise codes\.l1"):
        nnls_codes(*problem(0))


def test_misuse_is_refused() -> None:
    gram, rights = problem(0)
    with pytest.raises(ValueError, match="does not fit"):
        nnls_codes(gram.expand(N - 1, M, M), rights)
    support = torch.ones(N, M, dtype=torch.bool)
    support[4] = False
    with pytest.raises(ValueError, match="empty support"):
        nnls_codes(gram, rights, support=support)
