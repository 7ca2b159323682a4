"""Rounding a whole bank: its parts beside slow formulas, its rounds, and what a run stores of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from globe.am.records import Factors
from globe.am.refit import refit
from globe.bank.compose import mixed_bases
from globe.bank.precision import Precision
from globe.bank.rounding import NOISE, Grid, LevelGrid, round_nearest
from globe.config.choices import Activation
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.fit.finalise import finalise
from globe.fit.input_metric import InputMetric, second_moment_metric
from globe.fit.normalise import normalise
from globe.fit.plan import precision_of
from globe.fit.rounding import RoundedFactors, round_factors
from globe.numerics.metric import metric_of_roots

N, P, D, M, R, K = 7, 12, 20, 3, 9, 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(*, low_rank: bool = False, activation: str = "identity") -> tuple[Tensor, Factors]:
    """Experts of a planted bank with directions of falling weight, and some noise."""
    codes = normal(N, M, seed=1).abs()
    decay = torch.logspace(0, -1, R)
    left, right = normal(M, R, K, seed=2) * decay[:, None], normal(M, K, D, seed=3)
    bank = left @ right if low_rank else normal(M, R, D, seed=4) * decay[:, None]
    A = normal(N, P, R, seed=5) * torch.logspace(0, -0.7, R).flip(0)
    halves = (left, right) if low_rank else (None, None)
    lam = 0.0 if activation == "identity" else 1.0
    X = A @ mixed_bases(codes, bank, lam=lam, activation=activation)
    X = X + 0.05 * X.std() * normal(N, P, D, seed=6)
    return X, Factors(bank, codes, A, *halves)


def metric_for(kind: str, X: Tensor) -> InputMetric | None:
    if kind == "none":
        return None
    if kind == "experts":
        return second_moment_metric(X)
    roots = torch.eye(D).expand(N, D, D) + 0.3 * normal(N, D, D, seed=8).tril()
    return InputMetric(metric_of_roots(roots.contiguous()), 0.5 + normal(N, P, seed=9).abs())


def seen_error(X: Tensor, W: Tensor, metric: InputMetric | None) -> float:
    """sum_i ||D_i (X_i - W_i) L_i||^2, expert by expert."""
    total = 0.0
    for i in range(N):
        E = (X[i] - W[i]).double()
        if metric is not None:
            assert metric.columns is not None
            E = E @ metric.columns.of(slice(i, i + 1)).double().reshape(D, D)
            E = E if metric.rows is None else metric.rows[i].double()[:, None] * E
        total += float(E.square().sum())
    return total


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("kind", ["none", "experts", "inputs"])
def test_error_is_that_of_what_is_stored(kind: str, activation: str, low_rank: bool) -> None:
    X, factors = planted(low_rank=low_rank, activation=activation)
    metric, lam = metric_for(kind, X), 0.0 if activation == "identity" else 1.0
    scale = 0.5 + normal(N, seed=7).abs()
    found = round_factors(
        X,
        factors,
        Precision(3.0, 6, None, 8),
        lam=lam,
        activation=activation,
        export_dtype=torch.float32,
        scale=scale,
        metric=metric,
    )
    halves = {"atoms_left": found.factors.left, "atoms_right": found.factors.right} if low_rank else {}
    assert set(found.packed) == {"adapters"} | (set(halves) or {"bank"})
    for name, one in found.packed.items():
        stored = {"adapters": found.factors.adapters, "bank": found.factors.bank, **halves}[name]
        assert torch.equal(one.values(), stored)
    bank = None if low_rank else found.packed["bank"].values()
    read = {name: found.packed[name].values() for name in halves}
    basis = mixed_bases(
        found.factors.codes,
        bank,
        atoms_left=read.get("atoms_left"),
        atoms_right=read.get("atoms_right"),
        lam=lam,
        activation=activation,
    )
    W = (found.packed["adapters"].values() @ basis) / scale[:, None, None]
    assert found.error == pytest.approx(seen_error(X, W, metric), rel=1e-3)


def naive_error(
    X: Tensor, factors: Factors, precision: Precision, metric: InputMetric | None, activation: str
) -> float:
    """Everything rounded to the nearest level, equal bits for all columns, adapters refitted once before."""
    lam = 0.0 if activation == "identity" else 1.0
    bank = round_nearest(factors.bank, Grid.of(precision.atoms, D, 8)).values()
    basis = mixed_bases(factors.codes, bank, lam=lam, activation=activation)
    every = slice(0, N)
    seen = basis if metric is None else metric.bases(basis, every)
    A = refit(X if metric is None else metric.seen(X, every), seen, lambda_A=precision.ridge).adapters
    A = A if metric is None else metric.adapters(A, every)
    return seen_error(X, round_nearest(A, Grid.of(int(precision.adapters), R, R)).values() @ basis, metric)


@pytest.mark.parametrize("kind", ["none", "experts", "inputs"])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("bits", [2.0, 3.0])
def test_rounding_that_knows_is_far_better_than_plain_rounding(
    kind: str, activation: str, bits: float
) -> None:
    X, factors = planted(activation=activation)
    metric, precision = metric_for(kind, X), Precision(bits, 6, None, 8)
    lam = 0.0 if activation == "identity" else 1.0
    found = round_factors(
        X, factors, precision, lam=lam, activation=activation, export_dtype=torch.float32, metric=metric
    )
    assert found.error < 0.75 * naive_error(X, factors, precision, metric, activation)
    # bits of all rows together, in whole bytes for each
    assert 0.85 * N * P * int(bits * R) <= 8 * found.packed["adapters"].words.numel() <= N * P * int(bits * R)


@pytest.mark.parametrize("group", [None, R])
def test_rows_that_matter_get_the_bits(group: int | None) -> None:
    """Experts that are used ten or a hundred times as often as others: bits by row halve the error."""
    X, factors = planted()
    often = torch.logspace(0, -2, N)[:, None].expand(N, P).contiguous()
    metric = InputMetric(None, often)

    def rounded(group: int | None) -> RoundedFactors:
        precision = Precision(2.0, 6, group, 8)
        return round_factors(
            X, factors, precision, lam=0.0, activation="identity", export_dtype=torch.float32, metric=metric
        )

    found = rounded(group)
    packed = found.packed["adapters"]
    if group is None:
        assert isinstance(packed.grid, LevelGrid)
        widths = torch.tensor([sum(table) for table in packed.grid.tables])[packed.grid.levels.long()]
        assert float(widths[0].float().mean()) > float(widths[-1].float().mean()) + R
    assert group is None or rounded(None).error < 0.6 * found.error


def test_rows_that_are_inputs_are_rounded_together() -> None:
    """Of down, whose rows are inputs: an error in the metric of these is what is made small."""
    X, factors = planted()
    roots = (torch.eye(P).expand(N, P, P) + 0.6 * normal(N, P, P, seed=8).triu()).contiguous()

    def error(metric: InputMetric) -> float:
        found = round_factors(
            X,
            factors,
            Precision(2.0, 6, None, 8),
            lam=0.0,
            activation="identity",
            export_dtype=torch.float32,
            metric=metric,
        )
        W = found.packed["adapters"].values() @ mixed_bases(
            found.factors.codes, found.factors.bank, lam=0.0, activation="identity"
        )
        return float((roots @ (X - W)).square().sum())

    alone = InputMetric(None, roots.square().sum(dim=1).sqrt())
    assert error(InputMetric(None, roots)) < 0.8 * error(alone)


def test_rounds_move_atoms_and_never_raise_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    X, factors = planted(activation="tanh")

    def rounded(rounds: int) -> tuple[float, int]:
        monkeypatch.setattr("globe.fit.rounding._ROUNDS", rounds)
        found = round_factors(
            X, factors, Precision(2.0, 5, None, 8), lam=1.0, activation="tanh", export_dtype=torch.float32
        )
        return found.error, found.rounds

    results = [rounded(rounds) for rounds in range(4)]
    assert all(after[0] <= before[0] for before, after in itertools.pairwise(results))
    assert results[-1][0] < 0.97 * results[0][0]
    assert results[0][1] == 0
    assert results[-1][1] >= 1


def test_eight_bits_cost_next_to_nothing() -> None:
    X, factors = planted()
    M_ = mixed_bases(factors.codes, factors.bank, lam=0.0, activation="identity")
    exact = float((X - refit(X, M_).adapters @ M_).square().sum())
    found = round_factors(
        X, factors, Precision(8.0, 8, None, 8), lam=0.0, activation="identity", export_dtype=torch.float32
    )
    assert found.error < 1.02 * exact


def test_ridge_is_a_share_of_the_noise() -> None:
    assert Precision(4.0, 8, 64).ridge == pytest.approx(0.25 * NOISE[4])
    assert NOISE[3] * 0.25 > Precision(3.5, 8, 64).ridge > NOISE[4] * 0.25
    assert Precision(8.0, 8, 64).ridge == pytest.approx(0.25 * NOISE[8])
    assert Precision(8.0, 8).ridge == pytest.approx(0.02 * NOISE[8])
    assert Precision(2.0, 8, coded=True).ridge == pytest.approx(5e-4 * NOISE[2])
    assert Precision(8.0, 8, coded=True).ridge == 2e-6


@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("bits", [1.0, 2.7, 5.0])
def test_counted_bits_are_those_that_are_stored(bits: float, group: int | None, k: int | None) -> None:
    X, factors = planted(low_rank=k is not None)
    precision = Precision(bits, 5, group, 8)
    found = round_factors(X, factors, precision, lam=0.0, activation="identity", export_dtype=torch.bfloat16)
    stored = sum(8 * one.nbytes for one in found.packed.values()) + 8 * found.factors.codes.nbytes
    # atoms have no column factors, and offsets are of the grid
    counted = precision.bits(N, P, D, M, R, k)
    assert counted == stored if group else 0.85 * counted < stored <= counted


def test_finalise_measures_what_is_rounded() -> None:
    X, factors = planted()
    normalised = normalise(3 * X + 0.2, centre="scalar", scale="expert")
    done = finalise(
        factors,
        normalised,
        lam=0.0,
        activation="identity",
        export_dtype=torch.bfloat16,
        prune=0.0,
        precision=Precision(4.0, 8),
    )
    M_ = mixed_bases(
        done.factors.codes.float(),
        done.packed["bank"].values(torch.bfloat16).float(),
        lam=0.0,
        activation="identity",
    )
    assert done.mean is not None
    W = done.packed["adapters"].values(torch.bfloat16).float() @ M_ + done.mean
    error = float((3 * X + 0.2 - W).square().sum() / (3 * X + 0.2 - done.mean).square().sum()) ** 0.5
    assert done.relfrob == pytest.approx(error, rel=0.2)
    assert done.relfrob < 0.2


def test_bits_of_the_configuration() -> None:
    config = Config()
    assert precision_of(config) is None
    config.bank.bits = 3
    assert precision_of(config) == Precision(3.0, 6, None, 64)
    config.bank.bits_A, config.bank.group_A = 2.5, 16
    assert precision_of(config) == Precision(2.5, 6, 16, 64)
    config.bank.bits_B = 4
    assert precision_of(config) == Precision(2.5, 4, 16, 64)
    config.bank.bits, config.bank.bits_B = None, None
    assert precision_of(config) == Precision(2.5, 6, 16, 64)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bits": 9}, "bank.bits=9 is not possible: give a number from 1 to 8"),
        ({"bits_A": 0.5}, "bank.bits_A=0.5 is not possible"),
        ({"bits": 3, "bits_B": 1}, "bank.bits_B=1 is not possible: give an integer from 2 to 8"),
        ({"bits_B": 4}, "bank.bits_B=4 is not possible: give bank.bits or bank.bits_A with it"),
        ({"bits": 3, "group_A": 0}, "bank.group_A=0 is not possible"),
    ],
)
def test_impossible_bits_are_refused(changes: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replace(Config().bank, **changes)
    assert Activation.silu is Config().bank.activation
