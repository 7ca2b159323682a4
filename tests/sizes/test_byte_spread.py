"""One budget of bytes for all banks: more where errors cost more, never beyond the total."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from globe.bank.precision import Precision
from globe.bank.rounding import NOISE
from globe.config.composition import to_config
from globe.errors import ConfigError
from globe.fit.plan import Matrices, Outline
from globe.sizes.byte_spread import Bank
from run_support import composed, load, run_in

GIVEN = ("bank.m=1", "bank.r=d", "bank.activation=identity", "budget.over=model", "train.steps=1")


def bank(counts: torch.Tensor, weight: float = 1.0) -> Bank:
    return Bank(Outline((Matrices(1, "up"),), (7,), 12, 20), counts.double(), weight, 1, 20)


def test_bits_are_those_whose_gain_is_above_the_level() -> None:
    counts = torch.zeros(64)
    counts[0], counts[32] = 3 * 20, 4 * 20  # energies 1 and 1/4 of the total
    level = 0.9 * (NOISE[2] - NOISE[3])
    wanted = 0.0
    for energy, rows in ((1.0, 3), (0.25, 4)):
        wanted += rows * 20 * sum(energy * (NOISE[b] - NOISE[b + 1]) > level for b in range(8))
    assert bank(counts).bits(level) == pytest.approx(wanted / (7 * 12 * 20))
    # four times the weight is one bit for every entry more, or nearly
    assert bank(counts, 4.0).bits(level) == pytest.approx(bank(counts).bits(level / 4))


def test_a_share_is_that_of_the_file() -> None:
    counts = torch.zeros(64)
    counts[0] = 7 * 12 * 20
    one, config = bank(counts), to_config(composed("bank.size=0.3", *GIVEN))
    level = 0.9 * (NOISE[2] - NOISE[3])
    bits = Precision(3.0, 6, None, 64).bits(7, 12, 20, 1, 20, None)
    assert one.share(level, config) == pytest.approx((bits + 64) / (16 * 7 * 12 * 20))


@pytest.mark.parametrize(
    "text", [(), ("calibrate.text=embedded", "calibrate.tokens=1024", "calibrate.window=128")]
)
def test_a_run_keeps_to_one_budget(tmp_path: Path, text: tuple[str, ...]) -> None:
    given = (*GIVEN, *text, "bank.size=0.2", "layer=[4,12]", "family=all")
    _, folder = run_in(tmp_path, *given, f"output={tmp_path}")
    banks = load(folder / "summary.json")["banks"]
    assert len(banks) == 6
    held = sum(one["metrics"]["bytes"] for one in banks)
    allowed = 0.2 * sum(2 * one["parameters"] for one in banks)
    assert 0.97 * allowed <= held <= allowed
    shares = {one["key"]: one["metrics"]["bytes"] / (2 * one["parameters"]) for one in banks}
    if text:  # the whole output hangs on down, and its rows are not as uneven as others
        assert shares["layer012.down"] > 1.1 * shares["layer012.up"]


def test_what_contradicts_one_budget_of_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"budget\.over='model' is not possible: give bank\.kept, or bank\.size"
    ):
        to_config(composed("bank.size=0.2", "budget.over=model"))
    with pytest.raises(ConfigError, match=r"bank\.size=0\.05 "):
        run_in(tmp_path, *GIVEN, "bank.size=0.05", "layer=12")
