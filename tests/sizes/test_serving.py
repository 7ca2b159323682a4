"""What sizes cost to serve, against counts by hand, and the limits that searches keep to."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from globe.checkpoint import open_checkpoint
from globe.checkpoint.model_config import experts_per_token
from globe.config.choices import Activation, Family
from globe.config.schema import BankConfig, Config, ServeConfig
from globe.errors import ConfigError
from globe.fit.plan import BankSize
from globe.sizes.budget import Room, candidates
from globe.sizes.dry_run import dry_run
from globe.sizes.search import plan_search
from globe.sizes.serving import Layer, Serving, costs, served
from run_support import load, run_in

P, D = 20, 28


def drawn_reads(layer: Layer, size: BankSize, form: str, tokens: int) -> float:
    """Numbers that one step reads on average, expert by expert, over all equally likely choices of single tokens."""
    m, r, k = size.m, size.r, size.atom_rank
    missed = 1.0
    for _ in range(tokens):
        missed *= (layer.experts - layer.top_k) / layer.experts
    atoms = m * r * D if k is None else sum(r * k + k * D for _ in range(m))
    total = 0.0
    for family in range(3):
        for expert in range(layer.experts):
            if family >= layer.families or expert >= layer.factored or form == "dense":
                total += (1 - missed) * P * D
            else:
                total += (1 - missed) * (r * P + (r * D if form == "composed" else 0))
    if form not in ("dense", "composed"):
        total += atoms * layer.families / layer.joined
    return total


def held(layer: Layer, size: BankSize, form: str) -> float:
    """Numbers that one layer holds."""
    m, r, k = size.m, size.r, size.atom_rank
    dense = (3 * layer.experts - layer.families * layer.factored) * P * D
    if form == "composed":
        return dense + layer.families * layer.factored * r * (P + D)
    atoms = m * r * D if k is None else m * k * (r + D)
    banks = layer.families / layer.joined
    return dense + layer.families * layer.factored * (r * P + m) + atoms * banks / layer.layers


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    experts = draw(st.integers(1, 9))
    families = draw(st.integers(1, 3))
    return Layer(
        experts=experts,
        factored=draw(st.integers(1, experts)),
        top_k=draw(st.integers(1, experts)),
        families=families,
        joined=draw(st.sampled_from([1, families])),
        layers=draw(st.integers(1, 3)),
        itemsize=4,
    )


@given(layers(), st.integers(1, 9), st.integers(2, 19), st.booleans(), st.booleans())
def test_costs_are_what_counting_gives(layer: Layer, m: int, r: int, low_rank: bool, linear: bool) -> None:
    size = BankSize(m, r, 1 if low_rank else None)
    found = costs(layer, P, D, size, (1, 7), linear=linear)
    assert set(found) == {"composed", "latent" if linear else "bank"}
    for form, cost in found.items():
        dense = 3 * layer.experts * P * D
        assert cost.memory == pytest.approx(held(layer, size, form) / dense)
        assert cost.bytes == pytest.approx(4 * held(layer, size, form))
        for tokens in (1, 7):
            expected = drawn_reads(layer, size, "dense", tokens) / drawn_reads(layer, size, form, tokens)
            assert cost.speed[tokens] == pytest.approx(expected)


@given(layers(), st.integers(1, 9), st.integers(1, 20), st.floats(0.5, 3), st.floats(0.05, 1))
def test_a_cut_size_has_the_most_rows_that_serve(
    layer: Layer, m: int, r: int, speed: float, memory: float
) -> None:
    serving = Serving(layer, speed, memory, (1, 8), linear=False)
    size = BankSize(m, r, None)
    every = [replace(size, r=rows) for rows in range(1, r + 1)]
    good = [one for one in every if serving.serves(P, D, one)]
    assert serving.cut(P, D, size) == (good[-1] if good else None)


def test_both_limits_hold_for_one_form() -> None:
    """The composed form is fast and large, the bank small and slow: neither alone is both."""
    layer = Layer(experts=8, factored=8, top_k=1, families=3)
    size = BankSize(2, 8, None)
    found = costs(layer, P, D, size, (1,), linear=False)
    assert found["composed"].speed[1] > 1.3 > 1.1 > found["bank"].speed[1]
    assert found["composed"].memory > 0.6 > found["bank"].memory
    assert Serving(layer, 1.3, None, (1,), linear=False).serves(P, D, size)
    assert Serving(layer, None, 0.6, (1,), linear=False).serves(P, D, size)
    assert not Serving(layer, 1.3, 0.6, (1,), linear=False).serves(P, D, size)


def test_a_search_begins_with_sizes_that_serve() -> None:
    room = Room(9, P, D, 2600)
    serving = Serving(Layer(9, 9, 2, 3), 1.5, None, (1, 8), linear=False)
    plain = plan_search(room, Config(), lambda m: True)
    planned = plan_search(room, Config(), lambda m: True, serving)
    assert not all(serving.serves(P, D, size) for size in plain.first)
    assert planned.first == served(candidates(room, ratio=2.0, low_rank=True), serving, P, D)
    assert all(serving.serves(P, D, size) for size in planned.first)


def config_of(**serve: object) -> Config:
    return Config(
        family=Family.all,
        layer=1,
        bank=BankConfig(kept=0.6),
        serve=ServeConfig(**serve),  # type: ignore[arg-type]
    )


def test_dry_run_shows_what_serving_costs_and_keeps_to_its_limits() -> None:
    console = Console(width=200, record=True)
    found = dry_run(config_of(speed=1.2, batch=[1, 3]), console)
    for one in found:
        assert any(min(cost.speed.values()) >= 1.2 for cost in one.serving.values())
    text = console.export_text()
    assert "composed" in text
    assert "batch 3" in text


@pytest.mark.parametrize(
    ("bank", "serve", "family", "message"),
    [
        (BankConfig(kept=0.5), ServeConfig(speed=99), Family.all, "serve.speed=99: no sizes serve"),
        (BankConfig(kept=0.5), ServeConfig(memory=0.2), Family.up, "compress more families"),
        (BankConfig(m=4, r=20), ServeConfig(speed=2, memory=0.9), Family.all, "m=4, r=20 does not serve"),
    ],
)
def test_limits_that_nothing_keeps_to_are_refused(
    bank: BankConfig, serve: ServeConfig, family: Family, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        dry_run(Config(family=family, layer=1, bank=bank, serve=serve), Console(quiet=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 0.0}, "serve.speed=0.0"),
        ({"memory": 1.5}, "serve.memory=1.5"),
        ({"batch": [8, 0]}, "serve.batch="),
        ({"batch": []}, "serve.batch="),
    ],
)
def test_impossible_limits_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServeConfig(**changes)  # type: ignore[arg-type]


def test_limits_need_a_bank_whose_sizes_are_ours_to_choose() -> None:
    with pytest.raises(ConfigError, match=r"bank\.size"):
        Config(bank=BankConfig(size=0.2), serve=ServeConfig(speed=1.0))


def test_a_run_keeps_to_a_limit(tmp_path: Path) -> None:
    """The search is a real one; at kept=0.9 the plain choice would read more than the dense experts."""
    options = ("bank.kept=0.9", "budget.seconds=0.2", "train.steps=1", "family=up", "serve.speed=1.1")
    run_in(tmp_path, *options)
    (folder,) = tmp_path.iterdir()
    (searched,) = load(folder / "frontier.json")["shapes"].values()
    record = searched["frontier"]
    checkpoint = open_checkpoint("embedded")
    experts, top_k = record["room"]["n"], experts_per_token(checkpoint.config)
    serving = Serving(Layer(experts, experts, top_k or 0, 1), 1.1, None, (1, 8, 64), linear=False)
    p, d = record["room"]["p"], record["room"]["d"]
    assert serving.serves(p, d, BankSize(**record["chosen"]))
    assert not serving.serves(p, d, BankSize(1, min(p, d) * 9 // 10, None))


def test_experts_per_token_is_found_under_every_name() -> None:
    assert experts_per_token({"num_experts_per_tok": 4}) == 4
    assert experts_per_token({"text_config": {"moe_k": 3}}) == 3
    assert experts_per_token({"num_experts_per_tok": None}) is None


def test_linear_banks_are_served_latent() -> None:
    config = Config(family=Family.both, layer=1, bank=BankConfig(m=4, r=9, activation=Activation.identity))
    found = dry_run(config, Console(quiet=True))
    assert set(found[0].serving) == {"composed", "latent"}
