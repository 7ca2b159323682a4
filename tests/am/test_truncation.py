"""What makes few conjugate-gradient iterations enough: the truncation test, the coupled preconditioner, the damping."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from planted import configured, fitted, normal, plant, sizes_of
from torch import Tensor

import globe.am.dictionary.preconditioner as module
from globe.am.dictionary.gauss_newton import Direction, gauss_newton_direction
from globe.am.dictionary.preconditioner import Preconditioner, precondition
from globe.am.dictionary.tangent import Tangent, tangent
from globe.am.objective import Point, evaluate
from globe.am.records import StepOptions
from globe.am.state import Atoms, low_rank_atoms

N, P, D, M, R, K = 12, 9, 14, 7, 6, 2


def problem(*, low_rank: bool, dtype: torch.dtype = torch.float64) -> tuple[Tangent, Point]:
    """Experts whose codes are nearly alike, so that atoms pull on each other."""
    X = normal(N, P, D, seed=0).to(dtype)
    codes = (1 + 0.3 * normal(N, M, seed=1).abs()).to(dtype)
    if low_rank:
        atoms = low_rank_atoms(
            normal(M, R, K, seed=2).to(dtype), normal(M, K, D, seed=3).to(dtype) / 3, codes
        )
    else:
        atoms = Atoms(normal(M, R, D, seed=2).to(dtype) / 3, codes)
    at = evaluate(X, atoms.bank, codes, StepOptions(lam=1.0, activation="tanh"))
    return tangent(atoms.bank, codes, left=atoms.left, right=atoms.right), at


def sketcher() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def solved(slopes: Tangent, at: Point, iterations: int, tolerance: float = 0.0) -> Direction:
    return gauss_newton_direction(
        slopes, at, cg_iterations=iterations, cg_tolerance=tolerance, damping=1e-3, generator=sketcher()
    )


@pytest.mark.parametrize("low_rank", [False, True])
def test_the_truncation_test_ends_where_it_says(low_rank: bool) -> None:
    slopes, at = problem(low_rank=low_rank)
    falls = [solved(slopes, at, count).predicted for count in range(1, 41)]
    gains = [falls[0], *(after - before for before, after in pairwise(falls))]
    for tolerance in (0.5, 0.1):
        wanted = next(
            count for count in range(1, 41) if count * gains[count - 1] <= tolerance * falls[count - 1]
        )
        assert 1 < wanted < 40
        assert solved(slopes, at, 40, tolerance).predicted == pytest.approx(falls[wanted - 1], rel=1e-9)
        # fewer are made where fewer are allowed
        assert solved(slopes, at, wanted - 1, tolerance).predicted == pytest.approx(
            falls[wanted - 2], rel=1e-9
        )
    assert solved(slopes, at, 40, 1.0).predicted == pytest.approx(falls[0], rel=1e-12)


def as_matrix(solver: Preconditioner, like: tuple[Tensor, ...]) -> Tensor:
    """The preconditioner as a dense matrix over the flattened move."""
    lengths = [part.numel() for part in like]
    columns = []
    for unit in torch.eye(sum(lengths), dtype=like[0].dtype):
        parts = [one.view_as(part) for one, part in zip(unit.split(lengths), like, strict=True)]
        columns.append(torch.cat([part.flatten() for part in solver.apply(tuple(parts))]))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("coupled", [False, True])
def test_low_rank_preconditioners_are_symmetric_and_positive(
    coupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_COUPLED", M * K if coupled else M * K - 1)
    slopes, at = problem(low_rank=True)
    solver = precondition(slopes, at, damping=1e-3, generator=sketcher())
    assert solver.right is not None
    assert (solver.right.dim() == 2) == coupled
    assert slopes.left is not None
    assert slopes.right is not None
    matrix = as_matrix(solver, (slopes.left, slopes.right, slopes.coordinates))
    assert float((matrix - matrix.T).abs().max()) < 1e-10 * float(matrix.abs().max())
    assert float(torch.linalg.eigvalsh(matrix).min()) > 0


def test_coupled_atoms_need_fewer_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    slopes, at = problem(low_rank=True)
    whole = solved(slopes, at, 400).predicted
    shares = {}
    for most in (0, 8192):
        monkeypatch.setattr(module, "_MOST_COUPLED", most)
        shares[most] = solved(slopes, at, 6).predicted / whole
    assert shares[8192] > shares[0] + 0.05
    assert shares[8192] < 1


@pytest.mark.parametrize("low_rank", [False, True])
def test_a_bfloat16_preconditioner_is_the_same_to_its_rounding(low_rank: bool) -> None:
    slopes, at = problem(low_rank=low_rank, dtype=torch.float32)
    solver = precondition(slopes, at, damping=1e-3, generator=sketcher())
    parts = (slopes.bank,) if slopes.left is None or slopes.right is None else (slopes.left, slopes.right)
    move = tuple(torch.randn_like(part) for part in (*parts, slopes.coordinates))
    rough = solver.to(torch.bfloat16).apply(move)
    for one, other in zip(rough, solver.apply(move), strict=True):
        assert one.dtype == torch.float32
        assert 0 < float((one - other).norm() / other.norm()) < 0.03


def test_the_damping_falls_with_the_error() -> None:
    """0.1 of the relative objective is its floor: near an exact answer it vanishes."""
    truth = plant(m=3, r=4)
    result, records = fitted(truth.X, sizes_of(truth.X, 3, 4), configured(steps=40, damping=1e-2))
    assert result.relfrob < 1e-6
    relaxed = [record.damping for record in records if record.accepted]
    assert relaxed[-1] < 1e-5
    X = normal(10, 8, 12, seed=4)
    noisy, records = fitted(X, sizes_of(X, 2, 3), configured(steps=20))
    least = min(record.damping for record in records)
    assert least >= 0.09 * noisy.relfrob**2
