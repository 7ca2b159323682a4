"""A budget in bytes: sizes and bits that fill it, the search among them, and the run that keeps to it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.bank.file import read_artefact
from globe.config.composition import to_config
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.fit.plan import BankSize
from globe.sizes.byte_room import ATOM_BITS, ByteRoom, least_share, too_small
from globe.sizes.byte_search import search_bytes
from run_support import composed, load, run_in

N, P, D = 9, 26, 40


@given(st.integers(2, 40), st.integers(4, 60), st.integers(8, 90), st.floats(0.03, 0.5), st.integers(1, 6))
def test_filled_sizes_never_exceed_the_room(n: int, p: int, d: int, share: float, m: int) -> None:
    room = ByteRoom(n, p, d, math.floor(share * 16 * n * p * d))
    size = room.filled(min(m, n), 3.0)
    if size is None:
        assert room.count(BankSize(min(m, n), 1, None, 1.0, min(ATOM_BITS))) > room.bits
        return
    assert room.count(size) <= room.bits
    assert size.bits_A is not None
    assert 1 <= size.bits_A <= 8
    assert 1 <= size.r <= min(p, d)


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("share", [0.12, 0.2])
@pytest.mark.parametrize("shape", [(60, 176, 256), (60, 1408, 2048), (128, 768, 2048)])
def test_sizes_of_real_shapes_fill_the_room_to_half_a_percent(
    shape: tuple[int, int, int], share: float, m: int
) -> None:
    n, p, d = shape
    room = ByteRoom(n, p, d, math.floor(share * 16 * n * p * d))
    for average in (2.25, 3.0):
        size = room.filled(m, average)
        assert size is not None
        assert room.count(size) <= room.bits
        assert size.bits_A is not None
        if size.bits_A < 8:
            assert room.count(size) >= 0.995 * room.bits
        # near to the average that was asked for, unless there are no more rows to give bits to
        assert 1 / 1.6 < size.bits_A / average < 1.6 or size.r > 0.9 * min(p, d)


def test_search_takes_the_least_error_and_says_all_it_tried() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(14, D, generator=generator)
    X = torch.randn(N, P, 14, generator=generator) * torch.logspace(0, -1, 14) @ basis
    X = X / X.std()
    room = ByteRoom(N, P, D, math.floor(0.2 * 16 * N * P * D))
    config = Config()
    config.schedule.lam.start = config.schedule.lam.end = 0.0
    found = search_bytes(X, room, config, seed=3)
    errors = {probe.size: probe.relfrob for probe in found.rounds[0].probes}
    assert found.chosen == min(errors, key=errors.__getitem__)
    assert len(errors) >= 4
    assert len({size.m for size in errors}) >= 2
    # one basis made these experts, so one atom is what holds them in few bytes
    assert found.chosen.m == 1
    assert errors[found.chosen] < 0.2
    assert found == search_bytes(X, room, config, seed=3)


def test_too_small_a_share_is_refused_with_the_least_that_is_possible() -> None:
    room = ByteRoom(N, P, D, 10)
    assert room.filled(1, 3.0) is None
    least = least_share(room)
    assert ByteRoom(N, P, D, math.ceil(least * 16 * N * P * D)).filled(1, 3.0) is not None
    sentence = str(too_small(0.001, room))
    assert sentence.startswith("bank.size=0.001 is too small for 9 experts of 26 x 40: give a share from 0.")
    with pytest.raises(ConfigError, match=r"bank\.size=0\.001 is too small"):
        run_in(Path("/nonexistent"), "bank.size=0.001", "layer=12")


@pytest.mark.parametrize("options", [[], ["bank.activation=identity", "normalise.metric=experts"]])
def test_a_run_keeps_to_its_bytes(tmp_path: Path, options: list[str]) -> None:
    _, folder = run_in(tmp_path, "bank.size=0.16", "layer=[4,12]", "train.steps=8", *options)
    assert "_size0.16_" in folder.name
    banks = load(folder / "summary.json")["banks"]
    assert len(banks) == 2
    for bank in banks:
        held, allowed = bank["metrics"]["bytes"], 0.16 * 2 * bank["parameters"]
        assert 0.99 * allowed <= held <= allowed
        artefact = read_artefact(folder / "banks" / bank["key"])
        assert artefact.nbytes == held
        assert set(artefact.packed) == {"adapters", "bank"}
    shapes = load(folder / "frontier.json")["shapes"]
    (searched,) = shapes.values()
    assert searched["frontier"]["chosen"]["m"] == banks[0]["m"]
    assert searched["frontier"]["chosen"]["bits_A"] > 1


@pytest.mark.parametrize("share", [0.16, 0.3])
def test_given_sizes_get_the_bits_that_are_left(tmp_path: Path, share: float) -> None:
    options = ["bank.m=1", "bank.r=d", "bank.activation=identity", "normalise.metric=experts"]
    _, folder = run_in(tmp_path, f"bank.size={share}", "layer=12", "train.steps=2", *options)
    (bank,) = load(folder / "summary.json")["banks"]
    held, allowed = bank["metrics"]["bytes"], share * 2 * bank["parameters"]
    assert 0.985 * allowed <= held <= allowed
    assert (bank["m"], bank["r"]) == (1, 64)  # a row for every column, more than an expert's 44
    assert not (folder / "frontier.json").exists()


def test_given_sizes_without_room_for_a_bit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bank\.size=0\.05 leaves less than a bit"):
        run_in(tmp_path, "bank.size=0.05", "layer=12", "bank.m=1", "bank.r=d", "bank.activation=identity")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["bank.size=1.5"], "bank.size=1.5 is not possible: give a share above 0"),
        (["bank.size=0.2", "bank.bits=3"], "bank.size=0.2 chooses sizes and bits: leave out bank.bits=3"),
        (["bank.size=0.2", "bank.m=3"], "bank.size=0.2 takes bank.m and bank.r"),
        (["bank.size=0.2", "method=svd"], "bank.size=0.2 is not possible: give null with method=svd"),
        (["bank.size=0.2", "codes.target_support=2"], "codes.target_support=2 is not possible"),
    ],
)
def test_options_that_contradict_a_budget_in_bytes(options: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        to_config(composed(*options))
