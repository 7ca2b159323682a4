"""How much less short fits leave than a shared basis of the same size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import Sizes
from globe.config.composition import to_config
from globe.fit.input_metric import second_moment_metric
from globe.fit.normalise import normalise
from globe.fit.options import fit_options
from globe.sizes.curves import spectrum
from globe.sizes.gain import ATOMS, SHARES, Gain, measure_gain
from run_support import composed

N, P, D = 30, 13, 17


@pytest.fixture
def X() -> Tensor:
    """Two groups of experts, each with a row space of its own: one basis for both is far from what two atoms do."""
    draw = torch.Generator().manual_seed(0)
    spaces = torch.randn(2, 5, D, generator=draw, dtype=torch.float64)
    W = torch.randn(N, P, 5, generator=draw, dtype=torch.float64) @ spaces[torch.arange(N) % 2]
    W += 0.05 * torch.randn(N, P, D, generator=draw, dtype=torch.float64)
    return normalise(W, centre="scalar", scale="family").experts


def test_between_two_shares_the_logarithm_of_the_ratio_is_linear() -> None:
    gain = Gain((0.2, 0.6), (0.4, 0.1))
    assert gain.at(0.2) == pytest.approx(0.4)
    assert gain.at(0.4) == pytest.approx(math.sqrt(0.4 * 0.1))
    assert (gain.at(0.05), gain.at(1.0)) == (pytest.approx(0.4), pytest.approx(0.1))
    assert Gain().at(0.3) == 1.0


@pytest.mark.parametrize("weighted", [False, True])
def test_the_ratio_is_that_of_a_fit_and_of_the_closed_form(weighted: bool, X: Tensor) -> None:
    config = to_config(composed("bank.kept=0.5", "bank.activation=tanh", "train.steps=12", "dtype=float64"))
    metric = second_moment_metric(X) if weighted else None
    gain = measure_gain(X, metric, config)
    assert gain.shares == SHARES
    assert all(0 < one <= 1 for one in gain.ratios)
    limit = int(SHARES[1] * X.numel())
    r = min(P, (limit - N * ATOMS) // (N * P + ATOMS * D))
    m = min(N, (limit - N * P * r) // (r * D + N))
    seen = X if metric is None else metric.seen(X, slice(0, N))
    columns = None if metric is None else metric.kernel(linear=False)
    options = fit_options(to_config(composed("bank.activation=tanh", "train.steps=12", "train.patience=0")))
    fit = fit_bank(
        seen, Sizes(N, P, D, m, r), options, metric=columns, generator=torch.Generator().manual_seed(0)
    )
    assert gain.ratios[1] == pytest.approx(fit.relfrob**2 / spectrum(X, metric).error(limit), rel=1e-6)
    assert gain.ratios[1] < 0.5  # one basis can not hold both row spaces in as many numbers


def test_large_experts_are_tried_in_a_block_and_other_methods_not_at_all(X: Tensor) -> None:
    config = to_config(composed("bank.kept=0.5", "train.steps=2", "budget.seconds=1e-6"))
    assert measure_gain(X, second_moment_metric(X), config).shares == SHARES
    other = to_config(composed("method=shared_basis", "bank.kept=0.5"))
    assert measure_gain(X, None, other) == Gain()
