"""The export: its error is that of the numbers a reader gets, pruned, folded and rounded, mean included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from globe.am.records import Factors
from globe.bank.compose import rebuild
from globe.bank.file import BankArtefact, Member
from globe.errors import FitError
from globe.fit.finalise import Finalised, finalise
from globe.fit.normalise import Joined, join, normalise
from globe.numerics.activation import phi

N, P, D, M, R, K = 10, 5, 9, 4, 3, 2
FIRST = 6
"""experts of the first of two members"""


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_squares(X: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    return X @ torch.linalg.pinv(basis)


def bases(factors: Factors, lam: float) -> torch.Tensor:
    return phi(torch.einsum("nm,mrd->nrd", factors.codes, factors.bank), lam=lam, activation="silu")


def problem(
    centre: str = "scalar",
    scale: str = "family",
    *,
    noise: float = 0.1,
    shift: float = 0.5,
    lam: float = 0.7,
    low_rank: bool = False,
    seed: int = 0,
) -> tuple[torch.Tensor, Joined, Factors]:
    """Original experts of two members, their z-score, and good factors of it."""
    left, right = gaussian(M, R, K, seed=seed + 5), gaussian(M, K, D, seed=seed + 6)
    bank = left @ right if low_rank else gaussian(M, R, D, seed=seed)
    codes = gaussian(N, M, seed=seed + 1).abs() + 0.05
    codes[:, 1] *= 0.01
    truth = Factors(bank, codes, gaussian(N, P, R, seed=seed + 2))
    W = 0.02 * (truth.adapters @ bases(truth, lam) + noise * gaussian(N, P, D, seed=seed + 3))
    W[FIRST:] = 3 * W[FIRST:] + shift
    joined = join([normalise(part, centre=centre, scale=scale) for part in (W[:FIRST], W[FIRST:])])
    adapters = least_squares(joined.experts, bases(truth, lam))
    return (
        W,
        joined,
        truth._replace(adapters=adapters, **({"left": left, "right": right} if low_rank else {})),
    )


def exported(done: Finalised, lam: float) -> BankArtefact:
    low_rank = done.factors.left is not None
    return BankArtefact(
        members=(Member(0, "up", 0, FIRST, tuple(range(FIRST))), Member(0, "gate", FIRST, N, (0, 1, 2, 3))),
        codes=done.factors.codes,
        adapters=done.factors.adapters,
        activation="silu",
        lam=lam,
        bank=None if low_rank else done.factors.bank,
        atoms_left=done.factors.left,
        atoms_right=done.factors.right,
        mean=done.mean,
        scale=done.scale,
    )


def finished(joined: Joined, factors: Factors, **changes: Any) -> Finalised:
    options = {"lam": 0.7, "activation": "silu", "export_dtype": torch.float64, "prune": 0.0} | changes
    return finalise(factors, joined, **options)


def slow_relfrob(W: torch.Tensor, joined: Joined, rebuilt: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Residual of the dense experts, each divided by its own scale, against the normalised experts."""
    residual = W - rebuilt.double()
    if joined.scale is not None:
        residual = residual / (
            joined.scale[:, None, None] if joined.scale.dim() == 1 else joined.scale[:, :, None]
        )
    errors = residual.pow(2).sum(dim=(1, 2))
    return errors, float((errors.sum() / joined.experts.pow(2).sum()).sqrt())


@pytest.mark.parametrize("centre", ["none", "scalar", "expert_mean"])
@pytest.mark.parametrize("scale", ["none", "family", "expert", "row"])
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("refit", [None, least_squares])
def test_figures_are_those_of_the_rebuilt_experts(
    centre: str, scale: str, low_rank: bool, refit: Any
) -> None:
    W, joined, factors = problem(centre, scale, low_rank=low_rank)
    done = finished(joined, factors, refit=refit, prune=0.05)
    errors, expected = slow_relfrob(W, joined, rebuild(exported(done, 0.7)))
    torch.testing.assert_close(done.errors, errors, rtol=1e-8, atol=1e-12)
    assert done.relfrob == pytest.approx(expected, rel=1e-9)
    assert 0.001 < done.relfrob < 0.9
    torch.testing.assert_close(done.norms, joined.experts.pow(2).sum(dim=(1, 2)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("centre", ["scalar", "expert_mean"])
@pytest.mark.parametrize("low_rank", [False, True])
def test_figures_are_those_of_the_exported_dtype(dtype: torch.dtype, centre: str, low_rank: bool) -> None:
    W, joined, factors = problem(centre, "expert", noise=0.0, low_rank=low_rank)
    exact = finished(joined, factors)
    done = finished(joined, factors, export_dtype=dtype, refit=least_squares)
    assert {done.factors.bank.dtype, done.factors.codes.dtype, done.factors.adapters.dtype} == {dtype}
    assert done.mean is not None
    assert done.mean.dtype == (dtype if centre == "expert_mean" else torch.float64)
    one = exported(done, 0.7)
    _, expected = slow_relfrob(W, joined, rebuild(one, dtype=torch.float64))
    assert done.relfrob == pytest.approx(expected, rel=5e-6)
    if dtype != torch.float32:  # whose rounding is below what the figure itself is accurate to
        assert done.relfrob != pytest.approx(exact.relfrob, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (torch.float64, 0.0, 1e-12),
        (torch.float32, 1e-9, 1e-6),
        (torch.float16, 1e-5, 1e-2),
        (torch.bfloat16, 1e-4, 1e-1),
    ],
)
@pytest.mark.parametrize("low_rank", [False, True])
def test_a_lossless_fit_loses_the_rounding_and_nothing_else(
    dtype: torch.dtype, low: float, high: float, low_rank: bool
) -> None:
    W, joined, factors = problem("none", "row", noise=0.0, shift=0.0, low_rank=low_rank)
    done = finished(joined, factors, export_dtype=dtype, refit=least_squares)
    rebuilt = rebuild(exported(done, 0.7), dtype=torch.float64)
    assert low <= done.relfrob <= high
    # a float32 reader multiplies in float32 too, which costs as much as the rounding of the factors
    slack = 5e-8 if dtype == torch.float32 else 1e-13
    assert done.relfrob == pytest.approx(slow_relfrob(W, joined, rebuilt)[1], rel=0.05, abs=slack)


def test_refit_sees_the_rounded_bases_and_repairs_the_rounding() -> None:
    _, joined, factors = problem("scalar", "family", noise=0.0)
    seen = []

    def watched(X: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        seen.append(basis)
        return least_squares(X, basis)

    plain = finished(joined, factors, export_dtype=torch.bfloat16)
    refitted = finished(joined, factors, export_dtype=torch.bfloat16, refit=watched)
    assert refitted.relfrob < plain.relfrob
    rounded = Factors(factors.bank.bfloat16().double(), factors.codes.bfloat16().double(), factors.adapters)
    torch.testing.assert_close(torch.cat(seen), bases(rounded, 0.7), rtol=0, atol=1e-6)
    assert seen[0].dtype == joined.experts.dtype


def test_prune_is_applied_before_the_refit_and_counted() -> None:
    _, joined, factors = problem()
    done = finished(joined, factors, prune=0.2, refit=least_squares)
    expected = factors.codes * (factors.codes >= 0.2 * factors.codes.amax(dim=1, keepdim=True))
    assert torch.equal(done.factors.codes, expected)
    assert done.pruned == pytest.approx(float((expected == 0).double().mean()))
    assert 0 < done.pruned < 1
    without = finished(joined, factors, prune=0.2)
    assert done.relfrob < without.relfrob
    assert finished(joined, factors).pruned == 0.0


def test_low_rank_halves_are_exported_with_their_product() -> None:
    _, joined, factors = problem(low_rank=True)
    done = finished(joined, factors, export_dtype=torch.bfloat16)
    assert factors.left is not None
    assert factors.right is not None
    assert done.factors.left is not None
    assert done.factors.right is not None
    assert torch.equal(done.factors.left, factors.left.bfloat16())
    assert torch.equal(done.factors.right, factors.right.bfloat16())
    product = done.factors.left.double() @ done.factors.right.double()
    torch.testing.assert_close(done.factors.bank.double(), product, rtol=1e-2, atol=1e-2)


def test_one_member_may_be_given_as_it_was_normalised() -> None:
    W = 0.3 + gaussian(N, P, D)
    one = normalise(W, centre="expert_mean", scale="row")
    _, _, factors = problem()
    options = {"lam": 0.7, "activation": "silu", "export_dtype": torch.float64, "prune": 0.0}
    alone, joined = finalise(factors, one, **options), finalise(factors, join([one]), **options)
    assert alone.relfrob == joined.relfrob
    assert alone.mean is not None
    assert alone.mean.shape == (1, P, D)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(0, 0.9), st.sampled_from([torch.float64, torch.bfloat16]))
def test_refitting_never_raises_the_error(seed: int, prune: float, dtype: torch.dtype) -> None:
    _, joined, factors = problem(noise=0.3, seed=seed)
    plain = finished(joined, factors, prune=prune, export_dtype=dtype)
    refitted = finished(joined, factors, prune=prune, export_dtype=dtype, refit=least_squares)
    # the rounding of the adapters comes after the refit
    slack = 1e-9 if dtype == torch.float64 else 0.05
    assert refitted.relfrob <= plain.relfrob + slack


@pytest.mark.parametrize("which", ["bank", "codes", "adapters"])
def test_overflow_in_the_exported_dtype_is_refused(which: str) -> None:
    _, joined, factors = problem()
    huge = factors._replace(**{which: getattr(factors, which) * 1e8})
    with pytest.raises(FitError, match=rf"the {which} can't be written in export_dtype=float16.*bfloat16"):
        finished(joined, huge, export_dtype=torch.float16)
    broken = factors._replace(**{which: getattr(factors, which) * float("nan")})
    with pytest.raises(FitError, match="not finite"):
        finished(joined, broken, export_dtype=torch.float32)


def test_codes_that_vanish_in_the_exported_dtype_are_refused() -> None:
    _, joined, factors = problem()
    codes = factors.codes.clone()
    codes[3] *= 1e-12
    with pytest.raises(FitError, match="codes of 1 experts vanish in export_dtype=float16"):
        finished(joined, factors._replace(codes=codes), export_dtype=torch.float16)
