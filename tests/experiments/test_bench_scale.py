"""The points of `make bench-scale` are sizes that a fit takes."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch

from globe.am.loop import fit_bank
from globe.am.records import Sizes
from globe.fit.options import fit_options
from scripts import load_script


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    file = Path(__file__).parents[2] / "experiments" / "bench" / "scale.py"
    return load_script(file, "bench_scale")


def test_every_doubling_is_possible_and_doubles_one_size(scale: ModuleType) -> None:
    points = scale.doubled()
    assert len(points) == 3 * len(scale.BASE)
    for (key, factor), sizes in points.items():
        assert sizes.r <= min(sizes.p, sizes.d)
        assert sizes.m <= sizes.n
        assert {one: getattr(sizes, one) // size for one, size in scale.BASE.items()} == {
            one: factor if one == key else 1 for one in scale.BASE
        }


def test_a_small_fit_runs_with_the_options_of_the_bench(scale: ModuleType) -> None:
    X = scale.trained_like(8, 12, 16)
    records = []
    fit_bank(
        X,
        Sizes(8, 12, 16, 2, 6),
        fit_options(scale.fixed(3, "same")),
        generator=torch.Generator().manual_seed(0),
        on_step=records.append,
    )
    assert len(records) == 3


def test_the_slope_of_a_power_law_is_its_exponent(scale: ModuleType) -> None:
    assert scale.slope([2, 4, 8], [3 * one**1.5 for one in (2, 4, 8)]) == pytest.approx(1.5)


def test_the_rate_of_the_loop_is_positive_whatever_the_machine_does(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long loops took less than short ones where the machine was busy with other work."""
    monkeypatch.setattr(scale, "LARGE", 64)
    product = scale.Curvature.product
    times = itertools.accumulate(itertools.chain([0.0], itertools.cycle([5.0, 0.25, 3.0, 0.5])))
    monkeypatch.setattr(scale, "clock", lambda threads: next(times))
    found = scale.child_rate(Sizes(6, 12, 16, 3, 5), argparse.Namespace(dtype="same", threads=1))
    assert found["each"] == 0.25
    assert found["rate"] > 0
    assert scale.Curvature.product is product
