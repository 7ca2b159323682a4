"""The support of the codes through a fit: dense first, steered, cut to its target, held to the end."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from planted import configured, fitted, plant, sizes_of

from globe.am.coding import median_support
from globe.am.controls import CONTROL_FROM, FREEZE_FROM, Phase, controls_at, share_of_fit
from globe.am.records import FitResult, Sizes, StepRecord
from globe.config.choices import CodeMap, Curve, Dictionary, FirstCodes, Seeding
from globe.config.fit_options import CurveConfig
from globe.config.schema import Config, InitConfig, ScheduleConfig, TrainConfig
from globe.fit.options import fit_options

M = 6
STEPS = 20
SPARSE_START = InitConfig(seeding=Seeding.aligned, codes=FirstCodes.nnls)


def sparse_fit(
    target: int | None,
    *,
    n: int = 17,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    atom_rank: int | None = None,
    init: InitConfig | None = None,
    **options: Any,
) -> tuple[FitResult, list[StepRecord]]:
    X = plant(n=n, m=M, noise=0.2, dtype=dtype).X
    config = configured(steps=steps, cg_iterations=6, init=init or InitConfig(), **options)
    return fitted(X, sizes_of(X, M, target_support=target, atom_rank=atom_rank), config)


def median_of(result: FitResult) -> float:
    return float((result.factors.codes > 0).sum(dim=1).double().quantile(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [17, 16])
@pytest.mark.parametrize("target", [1, 2, 3, 5])
def test_the_median_support_ends_at_its_target(target: int, n: int, dtype: torch.dtype) -> None:
    result, records = sparse_fit(target, n=n, dtype=dtype)
    assert median_of(result) == target
    assert records[-1].support_median == target
    assert min(record.support_min for record in records) >= 1
    assert int((result.factors.codes > 0).sum(dim=1).min()) >= 1


OPTIONS: dict[str, dict[str, Any]] = {
    "sparsemax": {"codes": {"map": CodeMap.sparsemax}},
    "simplex": {"codes": {"simplex": True}},
    "low rank": {"atom_rank": 2},
    "mod": {"dictionary": Dictionary.mod},
    "silu": {"activation": "silu", "lam": 1.0},
    "coding alone": {"codes": {"joint": False, "every": 1}},
    "codes held": {"codes": {"joint": False, "every": 0}},
    "strong control": {"codes": {"eta": 0.5, "control_every": 1}},
    "l1": {"codes": {"l1": 0.02}},
    "sparse start": {"init": SPARSE_START},
}


@pytest.mark.parametrize("target", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_ends_within_one_atom(name: str, target: int) -> None:
    result, records = sparse_fit(target, **OPTIONS[name])
    assert abs(median_of(result) - target) <= 1
    assert min(record.support_min for record in records) >= 1
    if name == "simplex":
        sums = result.factors.codes.sum(dim=1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)


def test_without_a_target_the_codes_stay_dense() -> None:
    result, records = sparse_fit(None)
    assert median_of(result) >= 5
    assert {record.temperature for record in records} == {1.0}


def test_a_fit_stopped_in_its_dense_phase_is_cut_all_the_same() -> None:
    result, records = sparse_fit(2, time_limit=1e-9)
    assert len(records) == 1
    assert records[0].support_median > 2
    assert median_of(result) == 2
    # the error is that of the cut factors
    factors, X = result.factors, plant(n=17, m=M, noise=0.2).X
    rebuilt = factors.adapters @ torch.einsum("ij,jrd->ird", factors.codes, factors.bank)
    assert result.relfrob == pytest.approx(float((X - rebuilt).norm() / X.norm()), rel=1e-10)


def test_a_single_step_is_cut_too() -> None:
    """Within one atom: codes that fall to zero in their last refit have no steps left to be made up for."""
    result, _ = sparse_fit(2, steps=1)
    assert 1 <= median_of(result) <= 2


def test_codes_are_dense_then_steered_then_held() -> None:
    _, records = sparse_fit(2, codes={"control_every": 1})
    shares = [(record.step - 1) / (STEPS - 1) for record in records]
    dense = [record for record, share in zip(records, shares, strict=True) if share < CONTROL_FROM]
    frozen = [record for record, share in zip(records, shares, strict=True) if share >= FREEZE_FROM]
    assert dense[-1].support_median >= 5
    assert {record.temperature for record in dense} == {1.0}
    assert all(record.support_median <= 2 for record in frozen)
    assert len({record.temperature for record in frozen}) == 1
    # with its support held, the fit goes on descending
    objectives = [record.objective for record in frozen]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < objectives[0]


@pytest.mark.parametrize(("target", "init", "direction"), [(1, InitConfig(), -1), (M, SPARSE_START, 1)])
def test_the_control_moves_the_temperature_towards_the_target(
    target: int, init: InitConfig, direction: int
) -> None:
    """Too many atoms: colder at every control; too few: warmer. By at most a factor exp(0.1) each."""
    _, records = sparse_fit(
        target, init=init, dictionary=Dictionary.mod, codes={"control_every": 1, "every": 0, "eta": 0.5}
    )
    controlled = [
        record for record in records if CONTROL_FROM <= (record.step - 1) / (STEPS - 1) < FREEZE_FROM
    ]
    temperatures = [1.0, *(record.temperature for record in controlled)]
    ratios = [after / before for before, after in pairwise(temperatures)]
    assert len(ratios) >= 6
    assert all((ratio - 1) * direction > 0 for ratio in ratios)
    assert all(0.9 <= ratio <= 1.11 for ratio in ratios)
    assert all((record.support_median - target) * direction < 0 for record in controlled)


def test_the_controlled_temperature_makes_supports_smaller() -> None:
    """The coding steps of the control phase use it: the support falls before the cut."""
    _, records = sparse_fit(1, steps=40, codes={"control_every": 1, "every": 1, "eta": 0.5, "joint": False})
    shares = [(record.step - 1) / 39 for record in records]
    before = [record for record, share in zip(records, shares, strict=True) if share < CONTROL_FROM][-1]
    last = [record for record, share in zip(records, shares, strict=True) if share < FREEZE_FROM][-1]
    assert last.temperature < 0.7
    assert last.support_mean < before.support_mean - 0.5


def test_simplex_codes_stay_on_the_simplex() -> None:
    for every, joint in ((1, False), (5, True)):
        result, _ = sparse_fit(
            None, codes={"simplex": True, "every": every, "joint": joint}, dtype=torch.float32
        )
        codes = result.factors.codes
        assert bool((codes >= 0).all())
        torch.testing.assert_close(codes.sum(dim=1), torch.ones(len(codes)), rtol=0, atol=1e-5)


def test_l1_makes_codes_sparser() -> None:
    """At the expense of the objective: the result is where the fit ended, not where the error was least."""
    shares = []
    for l1 in (0.0, 0.03, 0.2):
        result, records = sparse_fit(None, codes={"l1": l1, "every": 1, "joint": False})
        shares.append(float((result.factors.codes == 0).double().mean()))
        assert result.relfrob == records[-1].relfrob
    assert shares[0] < shares[1] < shares[2]
    paid = [after > before for before, after in pairwise(record.objective for record in records)]
    assert any(paid)


@pytest.mark.parametrize("kind", [Curve.linear, Curve.cosine, Curve.exponential])
def test_schedules_reach_their_ends(kind: Curve) -> None:
    start = 0.1 if kind is Curve.exponential else 0.0
    schedule = {
        "lam": CurveConfig(kind, start, 0.9, hold=0.2),
        "beta": CurveConfig(kind, start, 1.0, hold=0.4),
        "temperature": CurveConfig(kind, 2.0, 0.5),
    }
    result, records = sparse_fit(None, steps=9, activation="silu", schedule=schedule)
    first, last = records[0], records[-1]
    assert (first.lam, first.beta, first.temperature) == (start, start, 2.0)
    assert (last.lam, last.beta, last.temperature) == (0.9, 1.0, 0.5)
    assert result.lam == 0.9
    for name, rising in (("lam", 1), ("beta", 1), ("temperature", -1)):
        values = [getattr(record, name) for record in records]
        assert values == sorted(values, reverse=rising < 0), name
        assert len(set(values)) > 3


def test_a_time_limit_takes_the_schedules_to_their_ends() -> None:
    """The last of these steps is the first to begin after the limit, and stands at the end."""
    train = fit_options(Config(train=TrainConfig(steps=1000, time_limit=10.0)))
    assert share_of_fit(train, 0, 0.0) == 0
    assert share_of_fit(train, 10, 5.0) == 0.5
    assert share_of_fit(train, 999, 1.0) == 1
    assert share_of_fit(train, 10, 12.0) == 1
    assert share_of_fit(fit_options(Config(train=TrainConfig(steps=1))), 0, 0.0) == 1


def test_phases_and_the_permission_to_stop() -> None:
    target, free = Sizes(9, 8, 7, 4, 3, target_support=2), Sizes(9, 8, 7, 4, 3)
    constant = fit_options(Config())
    phases = [controls_at(constant, target, share / 100).phase for share in range(101)]
    assert phases == [Phase.dense] * 30 + [Phase.control] * 40 + [Phase.frozen] * 31
    assert {controls_at(constant, free, share / 100).phase for share in range(101)} == {Phase.dense}
    assert controls_at(constant, free, 0.0).final
    assert not controls_at(constant, target, 0.0).final
    assert not controls_at(constant, target, 0.5).final
    assert controls_at(constant, target, 0.7).final
    homotopy = fit_options(
        Config(schedule=ScheduleConfig(lam=CurveConfig(Curve.linear, 0.0, 1.0, hold=0.25)))
    )
    assert [controls_at(homotopy, free, share).final for share in (0.0, 0.5, 0.74, 0.75, 1.0)] == [
        False,
        False,
        False,
        True,
        True,
    ]


def test_median_support() -> None:
    codes = torch.tensor([[1.0, 0, 0], [1, 1, 1], [1, 1, 1], [0, 1, 0]])
    assert median_support(codes) == 2.0
    assert median_support(codes[:3]) == 3.0
