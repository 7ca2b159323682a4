"""Products with the curvature: in chunks and parts, and from a point whose memory is given back."""

from __future__ import annotations

import pytest
import torch
from planted import normal
from small_case import (
    D,
    M,
    R,
    case,
    sketcher,
    slopes_at,
)

from globe.am.dictionary import curvature
from globe.am.dictionary.curvature import Curvature
from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.tangent import tangent
from globe.am.objective import evaluate
from globe.am.records import StepOptions
from globe.am.state import Atoms
from globe.numerics import chunks


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
