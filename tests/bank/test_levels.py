"""Rows that differ in their bits, and rows that are coupled: shared out, rounded, packed and read back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from globe.bank.feedback import RIDGE, metric_errors, round_with_feedback
from globe.bank.gauge import share_bits
from globe.bank.packing import Packed, read_packed
from globe.bank.rounding import NOISE, Grid, LevelGrid, group_scale, round_nearest, row_width
from globe.errors import ArtefactError

N, O, K = 3, 5, 11


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(n: int, k: int, seed: int) -> Tensor:
    M = normal(n, k, k + 3, seed=seed) + 3 * normal(n, 1, k + 3, seed=seed + 50)
    return M @ M.mT


def levels() -> LevelGrid:
    tables = ((0,) * K, (2,) * 4 + (1,) * 7, (5,) * 3 + (3,) * 6 + (0,) * 2)
    drawn = torch.randint(3, (N, O), generator=torch.Generator().manual_seed(3))
    return LevelGrid(tables, drawn.to(torch.uint8))


def test_rows_of_levels_are_rounded_like_rows_of_their_bits() -> None:
    grid, W, H = levels(), normal(N, O, K, seed=1), gram(N, K, 2)
    found = round_nearest(W, grid).values(), round_with_feedback(W, H, grid, sweeps=0).values()
    for i, row in itertools.product(range(N), range(O)):
        one = Grid(grid.tables[int(grid.levels[i, row])], K)
        here = W[i, None, row, None]
        torch.testing.assert_close(found[0][i, row], round_nearest(here, one).values()[0, 0])
        flipped = one._replace(bits=one.bits[::-1])  # columns of few bits come first where rows differ
        fed = (
            round_with_feedback(here.flip(2), H[i, None].flip(1, 2), flipped, sweeps=0).values()[0, 0].flip(0)
        )
        torch.testing.assert_close(found[1][i, row], fed, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("turned", [None, 3])
def test_packed_levels_are_read_back_bit_for_bit(turned: int | None) -> None:
    grid = levels()
    rounded = round_nearest(normal(N, O, K, seed=4).float(), grid)
    packed = Packed.of(rounded, torch.linspace(0.5, 2, K), turned)
    assert packed.shape == (N, O, K)
    assert torch.equal(packed.rounded().codes, rounded.codes)
    widths = torch.tensor([row_width(table) for table in grid.tables])[grid.levels.long()]
    assert packed.words.numel() == int(widths.sum())
    assert 8 * packed.nbytes == rounded.nbits + 16 * K
    assert torch.equal(packed[[2, 0]].values(), packed.values()[[2, 0]])
    joined = Packed.joined([packed[:1], packed[1:]])
    assert torch.equal(joined.values(), packed.values())
    again = read_packed(packed.tensors(), packed.layout(), "here")
    assert torch.equal(again.values(), packed.values())


@pytest.mark.parametrize("damage", ["level", "stream", "table", "missing", "columns"])
def test_damaged_levels_are_refused(damage: str) -> None:
    packed = Packed.of(round_nearest(normal(N, O, K, seed=4).float(), levels()))
    tensors, layout = dict(packed.tensors()), packed.layout()
    match damage:
        case "level":
            tensors["levels"] = torch.full((N, O), 3, dtype=torch.uint8)
        case "stream":
            tensors["words"] = tensors["words"][:-1]
        case "table":
            layout["levels"] = [[[9, K]], *layout["levels"][1:]]
        case "missing":
            del tensors["levels"]
        case "columns":
            layout["levels"] = [[[1, K - 1]], *layout["levels"][1:]]
    with pytest.raises(ArtefactError, match="here can't be used"):
        read_packed(tensors, layout, "here")


@pytest.mark.parametrize("total", [40, 200, 420, 5000])
def test_bits_go_where_they_gain_most(total: int) -> None:
    rows = torch.logspace(0, -4, N * O, dtype=torch.float64).view(N, O)
    columns = torch.logspace(0, -1, K, dtype=torch.float64)
    grid = share_bits(rows, columns, total)
    assert grid is not None
    bits = torch.tensor(grid.tables)[grid.levels.long()]
    assert 8 * sum(row_width(table) for table in bits.flatten(0, 1).tolist()) <= total

    def loss(each: Tensor) -> float:
        return float((rows[..., None] * columns * torch.tensor(NOISE, dtype=torch.float64)[each]).sum())

    alike = torch.full((N, O, K), min(8, total // (N * O * K)))
    assert loss(bits) <= loss(alike) * (1 + 1e-9)
    if total == 420:
        assert loss(bits) < 0.5 * loss(alike)
    by_importance = bits.sum(dim=2).flatten().tolist()
    assert by_importance == sorted(by_importance, reverse=True)


def test_rows_that_matter_alike_have_one_level() -> None:
    grid = share_bits(torch.ones(N, O), torch.ones(K), N * O * K * 2)
    assert grid is not None
    assert len(grid.tables) == 1
    assert share_bits(torch.zeros(N, O), torch.zeros(K), 100) is None


def slow_coupled(W: Tensor, R: Tensor, bits: int, order: Tensor) -> Tensor:
    """Optimal brain quantisation of each column, row by row, with the scale that the row as it has become wants."""
    inverse = torch.linalg.inv(R / R.diagonal().mean() + RIDGE * torch.eye(len(R), dtype=R.dtype))
    W, values, top = W.clone(), torch.empty_like(W), 2**bits - 1
    for i in order.tolist():
        scale = group_scale(W[i], torch.full((W.shape[1],), float(top)), searched=True)
        levels = torch.round(W[i] / scale + top / 2).clamp(0, top)
        values[i] = (levels - top / 2) * scale
        W -= torch.outer(inverse[i] / inverse[i, i], W[i] - values[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return values


@pytest.mark.parametrize("bits", [2, 4])
def test_coupled_feedback_equals_the_slow_definition(bits: int) -> None:
    W, R, H = normal(2, 4, 6, seed=5), gram(2, 4, 7), torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    found = round_with_feedback(W, H, Grid.of(bits, 6, 6), rows=R, sweeps=0).values()
    nearest, fed = round_nearest(W, Grid.of(bits, 6, 6)).values(), 0
    for i in range(2):
        both = torch.stack(
            [nearest[i].double(), slow_coupled(W[i], R[i], bits, R[i].diagonal().argsort(descending=True))]
        )
        errors = [float(((one - W[i]) * (R[i] @ (one - W[i]))).sum()) for one in both]
        torch.testing.assert_close(found[i].double(), both[int(errors[1] < errors[0])], rtol=1e-6, atol=1e-9)
        fed += errors[1] < errors[0]
    assert fed


@pytest.mark.parametrize("grid", [Grid.of(2, K, K), Grid.of(3, K, 4), levels()])
def test_sweeps_in_both_metrics_descend(grid: Grid | LevelGrid) -> None:
    W, H, R = normal(N, O, K, seed=8), gram(N, K, 9), gram(N, O, 10)
    errors = [float(metric_errors(W, round_nearest(W, grid).values(), H, R).sum())]
    for sweeps in range(4):
        found = round_with_feedback(W, H, grid, rows=R, sweeps=sweeps)
        errors.append(float(metric_errors(W, found.values(), H, R).sum()))
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-6)
    assert errors[-1] < 0.9 * errors[1] < 0.7 * errors[0]


def test_rows_without_coupling_are_fed_alike() -> None:
    W, H = normal(N, O, K, seed=11), gram(N, K, 12)
    eye = torch.eye(O, dtype=torch.float64).expand(N, O, O)
    alone = round_with_feedback(W, H, Grid.of(3, K, K), sweeps=2).values()
    both = round_with_feedback(W, H, Grid.of(3, K, K), rows=eye, sweeps=2).values()
    errors = [float(metric_errors(W, one, H).sum()) for one in (alone, both)]
    nearest = metric_errors(W, round_nearest(W, Grid.of(3, K, K)).values(), H)
    assert errors[0] <= errors[1] <= float(nearest.sum())
