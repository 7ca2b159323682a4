"""A word that can be typed has code behind it: what CONTRIBUTING says of extensions, one test for each kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch

import globe.runs.tracking as tracking
from globe.am.schedules import curve_value
from globe.am.seeding import seed_bank
from globe.config.choices import Activation, Curve, Metric, Seeding
from globe.fit import input_metric
from globe.numerics.activation import phi, phi_prime


@pytest.mark.parametrize("kind", Curve)
def test_every_curve_that_can_be_typed_is_computed(kind: Curve) -> None:
    first, last = (curve_value(str(kind), 0.9, 0.2, step, 7) for step in (0, 6))
    assert first == pytest.approx(0.9)
    assert last == pytest.approx(0.9 if kind is Curve.constant else 0.2)


@pytest.mark.parametrize("seeding", Seeding)
def test_every_seeding_that_can_be_typed_gives_a_bank(seeding: Seeding) -> None:
    n, p, d, m, r = 7, 9, 11, 3, 5
    X = torch.randn(n, p, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bank, groups = seed_bank(X, m, r, seeding=str(seeding), generator=torch.Generator().manual_seed(1))
    assert bank.shape == (m, r, d)
    assert sorted(set(groups.tolist())) == list(range(m))


@pytest.mark.parametrize("activation", Activation)
def test_every_activation_that_can_be_typed_has_its_derivative(activation: Activation) -> None:
    Y = torch.linspace(-3, 3, 41, dtype=torch.float64)
    step = 1e-6
    image = phi(Y, lam=0.7, activation=str(activation))
    slope = phi_prime(Y, lam=0.7, activation=str(activation), image=image)
    ahead, behind = (phi(Y + sign * step, lam=0.7, activation=str(activation)) for sign in (1, -1))
    expected = (ahead - behind) / (2 * step)
    torch.testing.assert_close(torch.ones_like(Y) if slope is None else slope, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("metric", [one for one in Metric if one not in (Metric.auto, Metric.none)])
def test_every_metric_that_can_be_typed_has_a_case(metric: Metric) -> None:
    assert f"case Choice.{metric.name}:" in inspect.getsource(input_metric.metric_of)


def sinks() -> Iterator[type]:
    for name, one in vars(tracking).items():
        if inspect.isclass(one) and name.endswith("Sink") and one is not tracking.Sink:
            yield one


@pytest.mark.parametrize("sink", list(sinks()))
def test_every_tracker_is_a_sink_that_runs_open(sink: type) -> None:
    assert isinstance(sink.__new__(sink), tracking.Sink)
    assert f"{sink.__name__}(" in inspect.getsource(tracking.open_sinks)
