"""Budgets: sizes that fill one and never exceed it, the search among them, and low-rank atoms in a run."""

from __future__ import annotations

import shutil
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import globe.fit.one_bank
import globe.sizes.chosen
import globe.sizes.search
from globe.am.records import Sizes
from globe.bank.compose import rebuild
from globe.bank.file import read_artefact
from globe.checkpoint import open_checkpoint
from globe.config.schema import BankConfig, BudgetConfig, Config, TrainConfig
from globe.errors import ConfigError, FitError
from globe.fit.plan import BankSize, plan
from globe.sizes.budget import Room, candidates, grid, neighbours, resized
from globe.sizes.search import FEWEST_AT_LAST, FEWEST_STEPS, plan_search, search
from outlined_model import Model
from run_support import EMBEDDED, FakeFit, bytes_of, load, run_in

ROOM = Room(9, 20, 28, 2600)


def anything(m: int) -> bool:
    return True


# --- sizes that fill a budget -----------------------------------------------------------------------------------------


@st.composite
def rooms(draw: st.DrawFn) -> Room:
    n, p, d = draw(st.integers(1, 70)), draw(st.integers(1, 200)), draw(st.integers(1, 200))
    return Room(n, p, d, int(draw(st.floats(0, 1)) * n * p * d))


@given(room=rooms(), ratio=st.floats(1.2, 3), step=st.integers(1, 5))
def test_no_candidate_exceeds_its_budget_and_none_has_room_left(room: Room, ratio: float, step: int) -> None:
    n, p, d, limit = astuple(room)
    found = candidates(room, ratio=ratio, low_rank=True, allows=lambda m: m % step == 0)
    for size in found:
        m, r, k = size.m, size.r, size.atom_rank
        assert room.parameters(size) <= limit
        assert room.parameters(size) == Sizes(n, p, d, m, r, atom_rank=k).parameters
        assert 1 <= m <= n
        assert 1 <= r <= min(p, d)
        assert m % step == 0
        if k is not None:
            assert m == n
            assert 1 <= k < r
            assert r == min(p, d) or room.parameters(BankSize(m, r + 1, k)) > limit
        else:
            more = BankSize(m + step, r, None)
            assert more.m > n or room.parameters(more) > limit
    assert len(set(found)) == len(found)
    if step == 1 and not found:
        assert limit < room.parameters(BankSize(1, 1, None))


@given(room=rooms(), factor=st.floats(1, 6), data=st.data())
def test_neither_halfway_nor_enlarged_sizes_exceed_the_budget(
    room: Room, factor: float, data: st.DataObject
) -> None:
    found = candidates(room, ratio=2.0, low_rank=True)
    if not found:
        return
    for size in neighbours(room, data.draw(st.sampled_from(found)), found):
        assert room.parameters(size) <= room.limit
        assert size not in found
    block = room.shrunk(factor)
    for size in candidates(block, ratio=2.0, low_rank=True):
        assert block.parameters(size) <= block.limit
        whole = resized(room, size, block)
        assert room.parameters(whole) <= room.limit
        assert (whole.atom_rank is None) <= (size.atom_rank is None or block.p < 12)


def test_candidates_of_a_known_room() -> None:
    assert candidates(ROOM, ratio=2.0, low_rank=False) == (
        BankSize(1, 12, None),
        BankSize(2, 10, None),
        BankSize(4, 8, None),
        BankSize(8, 6, None),
        BankSize(9, 5, None),
    )
    low = [size for size in candidates(ROOM, ratio=2.0, low_rank=True) if size.atom_rank is not None]
    assert low
    assert all(size.m == 9 for size in low)


def test_halfway_is_between_the_next_ones_of_the_same_kind() -> None:
    seen = candidates(ROOM, ratio=2.0, low_rank=True)
    assert [size.m for size in neighbours(ROOM, BankSize(4, 8, None), seen)] == [3, 6]
    assert [size.m for size in neighbours(ROOM, BankSize(8, 6, None), seen)] == [6]
    assert neighbours(ROOM, BankSize(1, 12, None), seen) == ()  # between 1 and 2 there is nothing


@given(first=st.integers(1, 40), more=st.integers(0, 300), ratio=st.floats(1.1, 4))
def test_a_grid_ascends_from_first_to_last(first: int, more: int, ratio: float) -> None:
    numbers = grid(first, first + more, ratio)
    assert (numbers[0], numbers[-1]) == (first, first + more)
    assert numbers == sorted(set(numbers))


# --- the search -------------------------------------------------------------------------------------------------------


def config_of(seconds: float = 10.0, steps: int = 400, kept: float = 0.5) -> Config:
    return Config(
        bank=BankConfig(kept=kept), budget=BudgetConfig(seconds=seconds), train=TrainConfig(steps=steps)
    )


@pytest.mark.parametrize("shape", [(16, 44, 60), (60, 176, 256), (60, 1408, 2048)])
def test_a_search_costs_about_what_it_may_and_knows_no_clock(shape: tuple[int, int, int]) -> None:
    n, p, d = shape
    room = Room(n, p, d, int(0.47 * n * p * d))
    for seconds in (16.0, 64.0, 256.0):
        planned = plan_search(room, config_of(seconds, kept=0.47), anything)
        assert planned.look.steps >= FEWEST_STEPS
        assert planned.last.steps >= FEWEST_AT_LAST
        assert planned.last.block.p >= planned.look.block.p
        for rung, number in ((planned.look, len(planned.first) + 4), (planned.last, 4)):
            block = rung.block
            assert block.p / block.d == pytest.approx(p / d, rel=0.05)
            assert block.limit / (n * block.p * block.d) == pytest.approx(0.47, rel=1e-2)
            sizes = [resized(block, size, room) for size in planned.first]
            each = sum(globe.sizes.search._seconds(block, size, config_of()) for size in sizes) / len(sizes)
            if rung.steps < 400:
                assert 0.2 * seconds < number * rung.steps * each <= 0.5 * seconds


def test_with_time_enough_all_is_fitted_whole_and_no_fit_is_longer_than_the_run() -> None:
    room = Room(60, 1408, 2048, int(0.47 * 60 * 1408 * 2048))
    assert plan_search(room, config_of(1e7), anything).look == (room, 400)
    planned = plan_search(Room(16, 44, 60, 20000), config_of(64.0, steps=20), anything)
    assert planned.look.steps == planned.last.steps == 20


def planted(m: int, r: int, *, n: int = 12, p: int = 20, d: int = 30) -> torch.Tensor:
    """Experts that a bank of m atoms and r rows reproduces, up to a little noise."""
    generator = torch.Generator().manual_seed(3)
    bank, codes = torch.randn(m, r, d, generator=generator), torch.rand(n, m, generator=generator)
    adapters = torch.randn(n, p, r, generator=generator)
    X = adapters @ torch.einsum("nm,mrd->nrd", codes, bank)
    return X / X.std() + 0.01 * torch.randn(n, p, d, generator=generator)


def test_the_search_finds_the_sizes_that_were_planted() -> None:
    """3 atoms of 8 rows are in the budget; 1 atom lacks the bank, many lack the rows."""
    X = planted(3, 8)
    room = Room(12, 20, 30, Sizes(12, 20, 30, 3, 8).parameters)
    config = config_of(steps=60)
    config.schedule.lam.start = config.schedule.lam.end = 0.0
    found = search(X, room, config, seed=1, allows=anything)
    assert found.chosen == BankSize(3, 8, None)
    errors = {probe.size: probe.relfrob for probe in found.rounds[-1].probes}
    assert min(errors, key=errors.__getitem__) == found.chosen
    assert len(found.rounds) == 1 or len(errors) <= 4
    again = search(X, room, config, seed=1, allows=anything)
    assert again == found


def test_a_size_that_breaks_is_left_out_and_all_broken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    X = planted(3, 8)
    room = Room(12, 20, 30, Sizes(12, 20, 30, 3, 8).parameters)
    inner = FakeFit()

    def breaks(experts: torch.Tensor, sizes: Sizes, *args: object, **kwargs: object) -> object:
        if sizes.m < 4:
            raise FitError("not finite")
        kwargs |= {"on_step": lambda record: None, "on_checkpoint": lambda state: None}
        return inner(experts, sizes, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(globe.sizes.search, "fit_bank", breaks)
    found = search(X, room, config_of(steps=20), seed=0, allows=anything)
    assert found.chosen.m >= 4
    assert any(error is None for one in found.rounds for error in [probe.relfrob for probe in one.probes])

    def always(*args: object, **kwargs: object) -> object:
        raise torch.linalg.LinAlgError("singular")

    monkeypatch.setattr(globe.sizes.search, "fit_bank", always)
    with pytest.raises(FitError, match=r"no size within bank\.kept could be fitted"):
        search(X, room, config_of(steps=20), seed=0, allows=anything)


# --- runs -------------------------------------------------------------------------------------------------------------

KEPT = ("bank.kept=0.47", "model.max_experts=7", "budget.seconds=0.5", "train.steps=12")


def test_a_run_within_a_budget_is_searched_once_for_all_its_banks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    searches: list[torch.Size] = []

    def counted(X: torch.Tensor, *args: object, **kwargs: object) -> object:
        searches.append(X.shape)
        return search(X, *args, **kwargs)  # type: ignore[arg-type]

    def stop(fit: int, step: int) -> None:
        if fit == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(globe.sizes.chosen, "search", counted)
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", FakeFit(stop))
    options = ("family=both", "layer=3-4", *KEPT)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, *options)
    (folder,) = tmp_path.iterdir()
    assert "kept0.47" in folder.name
    (record,) = load(folder / "frontier.json")["shapes"].values()
    assert record["probed"] == "layer004.up"
    printed = capsys.readouterr().out
    assert "sizes within 47.0%" in printed
    fit = FakeFit()
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", fit)
    run_in(tmp_path, *options)
    assert fit.fits == 2  # two of the four banks were finished
    run_in(tmp_path, *options)
    assert fit.fits == 2
    assert searches == [
        torch.Size([7, EMBEDDED.p, EMBEDDED.d])
    ]  # the second and third process read the first one's choice
    record = record["frontier"]
    chosen = (record["chosen"]["m"], record["chosen"]["r"], record["chosen"]["atom_rank"])
    for bank in load(folder / "summary.json")["banks"]:
        assert (bank["m"], bank["r"], bank["atom_rank"]) == chosen
        assert bank["kept_parameters"] <= 0.47 * bank["parameters"]
        artefact = read_artefact(folder / "banks" / bank["key"])
        assert artefact.kept_parameters == bank["kept_parameters"]


def test_equal_seeds_choose_equal_sizes_and_a_foreign_frontier_is_searched_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, first = run_in(tmp_path / "a", *KEPT)
    shutil.copytree(first, tmp_path / "b" / first.name)
    for name in ("banks", "summary.json"):
        path = tmp_path / "b" / first.name / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = (first / "frontier.json").read_text()
    (tmp_path / "b" / first.name / "frontier.json").write_text(
        text.replace('"fingerprint": "', '"fingerprint": "0')
    )
    _, second = run_in(tmp_path / "b", *KEPT)
    assert (second / "frontier.json").read_text() == text
    assert bytes_of(first, "layer012.up") == bytes_of(second, "layer012.up")
    (second / "frontier.json").write_text('{"format_version": 99}')
    (second / "summary.json").unlink()
    run_in(tmp_path / "b", *KEPT)
    assert "frontier.json is ignored" in caplog.text
    assert (second / "frontier.json").read_text() == text


def test_overwriting_a_run_repeats_its_search(tmp_path: Path) -> None:
    _, folder = run_in(tmp_path, *KEPT)
    (folder / "frontier.json").write_text("{}")
    run_in(tmp_path, *KEPT, "overwrite=true")
    assert load(folder / "frontier.json")["shapes"]


@pytest.mark.parametrize("centre", ["none", "scalar", "expert_mean"])
@pytest.mark.parametrize("scope", ["family", "families"])
def test_the_budget_pays_for_the_stored_means_too(centre: str, scope: str) -> None:
    config = config_of(kept=0.47)
    config.family, config.layer = type(config.family)("both"), 3
    config.bank.scope = type(config.bank.scope)(scope)
    config.normalise.centre = type(config.normalise.centre)(centre)
    from globe.fit.plan import outline

    (bank, *_) = outline(config, Model())
    room = globe.sizes.chosen.room_of(config, bank)
    for size in candidates(room, ratio=2.0, low_rank=True):
        made = next(one for one in plan(config, Model(), {bank.shape: size}) if one.outline == bank)
        assert made.kept <= 0.47
        assert made.kept > 0.42


def test_a_target_support_leaves_out_sizes_for_which_it_does_not_come_out() -> None:
    config = config_of(kept=0.47)
    from globe.fit.plan import outline

    (bank,) = outline(config, Model())
    config.codes.target_support = "m/3"
    room = globe.sizes.chosen.room_of(config, bank)
    found = candidates(room, ratio=2.0, low_rank=True, allows=lambda m: globe.sizes.chosen.allows(config, m))
    assert found
    assert all(size.m % 3 == 0 for size in found)
    config.codes.target_support = 17
    with pytest.raises(ConfigError, match=r"^codes\.target_support=17 is more than the 16 atoms"):
        globe.sizes.chosen.room_of(config, bank)
    config.codes.target_support, config.bank.kept = 9, 0.03
    with pytest.raises(ConfigError, match=r"leaves no room for the atoms that codes\.target_support=9 needs"):
        globe.sizes.chosen.room_of(config, bank)


# --- low-rank atoms ---------------------------------------------------------------------------------------------------


def test_a_run_with_low_rank_atoms_exports_their_halves_and_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("bank.m=7", "bank.r=13", "bank.atom_rank=3", "model.max_experts=9", "train.steps=3")
    figure, folder = run_in(tmp_path, *options, "export_dtype=float32")
    assert "_k3_" in folder.name
    (bank,) = load(folder / "summary.json")["banks"]
    assert bank["atom_rank"] == 3
    artefact = read_artefact(folder / "banks" / "layer012.up")
    assert artefact.bank is None
    assert artefact.atoms_left is not None
    assert artefact.atoms_left.shape == (7, 13, 3)
    p, d = EMBEDDED.p, EMBEDDED.d
    kept = 9 * p * 13 + 7 * 3 * (13 + d) + 9 * 7 + 1  # no gauge fixing is counted
    assert bank["kept_parameters"] == kept == artefact.kept_parameters
    assert bank["kept"] == pytest.approx(kept / (9 * p * d))
    W = open_checkpoint(None).read_experts(12, "up", max_experts=9).weights.double()
    left = (W - rebuild(artefact).double()).norm()
    assert figure == pytest.approx(float(left / (W - W.mean()).norm()), rel=1e-5)
    assert " k " in capsys.readouterr().out


def test_an_atom_rank_is_an_expression_in_the_sizes_of_an_atom() -> None:
    def rank(value: int | str) -> int | None:
        return plan(Config(bank=BankConfig(r="3p/4", atom_rank=value)), Model())[0].sizes.atom_rank

    assert [rank(value) for value in ("r/3", "p/4", "d/5", "2r/11", 33)] == [11, 11, 12, 6, 33]
