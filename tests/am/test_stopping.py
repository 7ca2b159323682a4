"""Why a fit ends, what it reports on the way, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from planted import configured, fitted, plant, sizes_of

from globe.am.objective import evaluate
from globe.am.records import StepOptions, StopReason
from globe.am.temperature import prune
from globe.config.choices import Curve, FirstCodes, Seeding
from globe.config.fit_options import CurveConfig
from globe.config.schema import InitConfig
from globe.errors import FitError


def test_all_steps() -> None:
    X = plant(noise=0.2).X
    result, records = fitted(X, sizes_of(X), configured(steps=4))
    assert result.stop is StopReason.steps
    assert result.steps == 4
    assert [record.step for record in records] == [1, 2, 3, 4]


def test_the_time_limit() -> None:
    X = plant(noise=0.2).X
    result, records = fitted(X, sizes_of(X), configured(steps=1000, time_limit=1e-9))
    assert result.stop is StopReason.time
    assert result.steps == len(records) == 1


def test_a_plateau_of_the_validation_error_with_a_stable_support() -> None:
    X = plant(noise=0.2).X
    config = configured(steps=100, patience=2, evaluate_every=1, tolerance=0.02, codes={"every": 0})
    result, records = fitted(X, sizes_of(X), config)
    assert result.stop is StopReason.converged
    assert 3 < result.steps < 40
    errors = [record.validation_relfrob for record in records]
    best = math.inf
    without = []
    for error in errors:
        assert error is not None
        without.append(0 if error < best * 0.98 else without[-1] + 1)
        best = min(best, error)
    # a support that changes counts as progress, so the plateau may be longer than the patience, never shorter
    assert without[-1] >= 2
    assert fitted(X, sizes_of(X), configured(steps=40, evaluate_every=1, tolerance=0.02))[0].steps == 40


def test_no_early_stop_before_the_schedules_are_at_their_ends() -> None:
    X = plant(noise=0.2).X
    schedule = {"lam": CurveConfig(Curve.linear, 0.0, 1.0, hold=0.25)}
    config = configured(
        steps=21, activation="silu", schedule=schedule, patience=1, evaluate_every=1, tolerance=1.0
    )
    result, records = fitted(X, sizes_of(X), config)
    assert result.stop is StopReason.converged
    assert result.steps == 16
    assert records[-1].lam == result.lam == 1.0
    assert records[-2].lam < 1.0


def test_no_early_stop_before_the_support_is_held() -> None:
    X = plant(m=6, noise=0.2).X
    config = configured(steps=21, patience=1, evaluate_every=1, tolerance=1.0, init=InitConfig())
    result, records = fitted(X, sizes_of(X, 6, target_support=2), config)
    assert result.stop in (StopReason.converged, StopReason.steps)
    assert result.steps > 14
    assert records[-1].support_median <= 2


def test_stalled_where_nothing_descends() -> None:
    """Experts of zeros: the objective is zero at the start and no step lowers it."""
    X = torch.zeros(7, 5, 6)
    result, records = fitted(X, sizes_of(X, 2, 3), configured(steps=100, codes={"every": 0}))
    assert result.stop is StopReason.stalled
    assert result.steps == result.rejected == len(records) < 30
    assert not any(record.accepted for record in records)
    dampings = [record.damping for record in records]
    assert dampings == sorted(dampings)
    assert dampings[-1] > 100 * dampings[0]


def test_a_fit_ends_at_the_floor_of_float32() -> None:
    X = plant(dtype=torch.float32).X
    config = configured(steps=400, cg_iterations=20, patience=4, evaluate_every=5)
    result, _ = fitted(X, sizes_of(X), config, seed=0)
    assert result.relfrob < 1e-4
    assert result.stop in (StopReason.converged, StopReason.stalled)


@pytest.mark.parametrize("reason", StopReason)
def test_every_reason_has_its_sentence(reason: StopReason) -> None:
    assert reason.sentence[0].islower()
    assert "\n" not in reason.sentence
    assert len(reason.sentence) > 20


def test_the_validation_error_is_that_of_what_would_be_exported() -> None:
    X = plant(noise=0.2).X
    config = configured(steps=4, evaluate_every=2, codes={"prune": 0.3}, init=InitConfig())
    result, records = fitted(X, sizes_of(X), config, export_dtype=torch.bfloat16)
    assert [record.validation_relfrob is None for record in records] == [True, False, True, False]
    factors = result.factors
    codes = prune(factors.codes, 0.3)
    assert int((codes > 0).sum()) < int((factors.codes > 0).sum())
    at = evaluate(
        X,
        factors.bank.bfloat16().double(),
        codes.bfloat16().double(),
        StepOptions(lam=0.0, activation="identity"),
    )
    wanted = math.sqrt(at.objective / float((X**2).sum()))
    assert records[-1].validation_relfrob == pytest.approx(wanted, rel=1e-9)
    assert records[-1].validation_relfrob != pytest.approx(records[-1].relfrob, rel=1e-3)


def test_records_are_true_figures() -> None:
    X = plant(noise=0.2).X
    result, records = fitted(X, sizes_of(X), configured(steps=6))
    total = float((X**2).sum())
    support = (result.factors.codes > 0).sum(dim=1).double()
    last = records[-1]
    # the objective holds the price of the ridge beside the error
    assert last.relfrob <= math.sqrt(last.objective / total) == pytest.approx(last.relfrob, rel=1e-6)
    assert last.relfrob == result.relfrob
    assert last.support_mean == pytest.approx(float(support.mean()))
    assert (last.support_min, last.support_max) == (int(support.min()), int(support.max()))
    assert last.support_median == float(support.median())
    seconds = [record.seconds for record in records]
    assert seconds == sorted(seconds)
    assert result.seconds == seconds[-1] > 0
    for record in records:
        parts = record.seconds_coding + record.seconds_dictionary + record.seconds_refit
        assert 0 < parts <= record.seconds
        assert set(record.flat()) == set(type(record).__slots__)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("seeding", Seeding)
@pytest.mark.parametrize("codes", FirstCodes)
def test_weights_that_are_not_finite_are_refused(codes: FirstCodes, seeding: Seeding, bad: float) -> None:
    X = plant(noise=0.1, dtype=torch.float32).X
    X[3, 2, 5] = bad
    config = configured(steps=2, init=InitConfig(seeding=seeding, codes=codes))
    with pytest.raises(FitError) as caught:
        fitted(X, sizes_of(X), config)
    sentence = str(caught.value)
    assert "not finite" in sentence
    assert "check the checkpoint" in sentence
    assert "\n" not in sentence


def test_a_fit_that_overflows_says_so() -> None:
    X = plant(noise=0.1, dtype=torch.float32).X * 1e25
    with pytest.raises(FitError, match=r"no longer finite: check the weights for NaN, raise train\.damping"):
        fitted(X, sizes_of(X), configured(steps=3, init=InitConfig()))
