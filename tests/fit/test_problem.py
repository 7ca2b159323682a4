"""Layers and sizes: every spelling that is allowed, and one sentence for each that is not."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from globe.config.choices import Family
from globe.config.schema import BankConfig, CodesConfig, Config, ModelConfig
from globe.errors import ConfigError
from globe.fit.plan import Matrices, parse_layers, plan, resolve_size

ALL = tuple(range(24))
DEEP = tuple(range(3, 24))
"""of an architecture whose first layers are dense"""
EVERY_SECOND = (1, 3, 5)


class Shape(NamedTuple):
    n: int
    p: int
    d: int


class Model:
    """A checkpoint reduced to what a plan asks of it."""

    def __init__(self, moe_layers: tuple[int, ...] = ALL, num_layers: int = 24) -> None:
        self.moe_layers, self.num_layers = moe_layers, num_layers

    def shape(self, layer: int, family: str) -> Shape:
        return Shape(n=16, p=44, d=60)


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        (12, (12,)),
        ("12", (12,)),
        ("all", ALL),
        ([4, 12, 20], (4, 12, 20)),
        ([20, 4, 4], (4, 20)),
        ("4-8", (4, 5, 6, 7, 8)),
        ("4:8", (4, 5, 6, 7, 8)),
        ("4..8", (4, 5, 6, 7, 8)),
        (" 7 - 7 ", (7,)),
        (["4-6", 12], (4, 5, 6, 12)),
        (["2:3", "9..10", "5"], (2, 3, 5, 9, 10)),
        ("4-5+12", (4, 5, 12)),
        ("4,12", (4, 12)),
        ((0, 23), (0, 23)),
    ],
)
def test_every_spelling_of_layers(value: object, layers: tuple[int, ...]) -> None:
    assert parse_layers(value, ALL, 24) == layers


def test_groups_of_layers_are_cut_to_those_that_have_experts() -> None:
    assert parse_layers("early", ALL, 24) == (4, 5, 6, 7, 8)
    assert parse_layers("middle", ALL, 24) == (12, 13, 14, 15, 16)
    assert parse_layers("late", ALL, 24) == (20, 21, 22, 23)
    assert parse_layers(["early", 1], EVERY_SECOND, 6) == (1, 5)
    with pytest.raises(ConfigError, match="layer=late asks for layer 20, which is not in this model of 6"):
        parse_layers("late", EVERY_SECOND, 6)


def test_all_is_the_moe_layers_only() -> None:
    assert parse_layers("all", DEEP, 24) == DEEP


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (24, "layer=24 is not in this model of 24 layers: give layers out of 0-23"),
        (-1, "layer=-1 is not in this model"),
        ("20-24", "layer=20-24 asks for layer 24, which is not in this model"),
        ("0-99999999999999", "asks for layer 24, which is not in this model"),
        ("30-40", "asks for layer 30, which is not"),
        ([4, 99], "layer=[4, 99] asks for layer 99"),
        ("8-4", "layer=8-4 is not understood: give a layer number, all, a list like [4,12,20]"),
        ("first", "layer=first is not understood"),
        ("", "layer='' is not understood"),
        ([], "layer=[] is not understood"),
        (True, "layer=True is not understood"),
        (1.5, "layer=1.5 is not understood"),
        ([4, "x"], "layer=[4, x] is not understood"),
        ([[4], []], "is not understood"),
    ],
)
def test_wrong_layers_are_one_sentence(value: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_layers(value, ALL, 24)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dense_layer_is_named_as_such() -> None:
    with pytest.raises(
        ConfigError, match=r"layer=2 is a dense layer without experts: give layers out of 3-23"
    ):
        parse_layers(2, DEEP, 24)
    with pytest.raises(ConfigError, match=r"layer=2-5 asks for layer 2, which is a dense layer"):
        parse_layers("2-5", DEEP, 24)
    with pytest.raises(ConfigError, match=r"layer=4 is a dense .* out of 1, 3, 5"):
        parse_layers(4, EVERY_SECOND, 6)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (15, 15),
        ("15", 15),
        ("n", 16),
        ("n/4", 4),
        ("3n/4", 12),
        ("3*n/4", 12),
        (" 3 * n / 4 ", 12),
        ("0.25n", 4),
        ("0.5*n/2", 4),
        ("n/16", 1),
    ],
)
def test_sizes_by_expression(value: int | str, size: int) -> None:
    assert resolve_size("bank.m", value, {"n": 16}, 16, "the experts") == size


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("n/5", "bank.m='n/5' is 3.2 for n=16, not a whole number: give 3 or 4"),
        ("n/32", "bank.m='n/32' is 0.5 for n=16, not a whole number: give 1"),
        ("2n", "bank.m='2n', which is 32, is more than the experts: give at most 16"),
        (17, "bank.m=17 is more than the experts: give at most 16"),
        ("0n", "bank.m='0n', which is 0, is too small: give at least 1"),
        ("-3", "bank.m='-3', which is -3, is too small"),
        (
            "p/2",
            "bank.m='p/2' is not understood: give an integer or an expression in n such as n/4, 3n/4 or round(n/8)",
        ),
        ("n/0", "is not understood"),
        ("n//4", "is not understood"),
        ("n*3/4", "is not understood"),
        ("quarter", "is not understood"),
        ("", "is not understood"),
        ("1.5", "is not understood"),
        ("n n", "is not understood"),
        (True, "is not understood"),
    ],
)
def test_wrong_sizes_are_one_sentence(value: int | str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_size("bank.m", value, {"n": 16}, 16, "the experts")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    factor=st.integers(0, 9),
    divisor=st.integers(1, 9),
    n=st.integers(1, 300),
    star=st.booleans(),
)
def test_an_expression_is_exact_or_refused_with_its_neighbours(
    factor: int, divisor: int, n: int, star: bool
) -> None:
    value = f"{factor}{'*' if star else ''}n/{divisor}"
    exact = Fraction(factor * n, divisor)
    if exact.denominator == 1 and 1 <= exact <= n:
        assert resolve_size("bank.m", value, {"n": n}, n, "the experts") == exact
        return
    with pytest.raises(ConfigError, match=r"^bank\.m=") as caught:
        resolve_size("bank.m", value, {"n": n}, n, "the experts")
    if exact.denominator > 1 and 1 < exact < n:
        assert f"give {int(exact)} or {int(exact) + 1}" in str(caught.value)


def test_plan_gives_one_bank_per_layer_and_family_in_order() -> None:
    config = Config(
        family=Family.both,
        layer="4-5",
        bank=BankConfig(m="n/8", r="3p/4"),
        codes=CodesConfig(target_support="m/2"),
    )
    banks = plan(config, Model())
    assert [bank.key for bank in banks] == ["layer004.up", "layer004.gate", "layer005.up", "layer005.gate"]
    assert banks[1].members == (Matrices(4, "gate"),)
    sizes = banks[0].sizes
    assert (sizes.n, sizes.p, sizes.d, sizes.m, sizes.r, sizes.target_support) == (16, 44, 60, 2, 33, 1)
    assert sizes.kept == pytest.approx((16 * 44 * 33 + 2 * 33 * 60 + 16 * 2) / (16 * 44 * 60))


def test_plan_counts_the_experts_that_are_really_read() -> None:
    few = Config(model=ModelConfig(max_experts=12), bank=BankConfig(m="n/4"))
    assert plan(few, Model())[0].sizes.n == 12
    assert plan(few, Model())[0].sizes.m == 3
    more_than_there_are = Config(model=ModelConfig(max_experts=99))
    assert plan(more_than_there_are, Model())[0].sizes.n == 16
    with_shared = Config(model=ModelConfig(include_shared=True), bank=BankConfig(m="n"))
    assert plan(with_shared, Model())[0].sizes.m == 17


@pytest.mark.parametrize(("support", "is_sought"), [(3, 3), (4, 4), (5, None), (12, None), (None, None)])
def test_a_support_above_the_number_of_atoms_is_that_of_dense_codes(
    support: int | None, is_sought: int | None
) -> None:
    config = Config(bank=BankConfig(m=4), codes=CodesConfig(target_support=support))
    assert plan(config, Model())[0].sizes.target_support == is_sought


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Config(bank=BankConfig(m=17)), "bank.m=17 is more than the 16 experts that share the bank"),
        (
            Config(bank=BankConfig(r=45)),
            "bank.r=45 is more than min(p, d)=44, the rank of a 44 x 60 expert: give at most 44",
        ),
        (Config(bank=BankConfig(r="d")), "bank.r='d', which is 60, is more than min(p, d)=44"),
        (Config(bank=BankConfig(r="p/3")), "bank.r='p/3' is 14.6667 for p=44, d=60, not a whole number"),
        (
            Config(bank=BankConfig(r="n")),
            "bank.r='n' is not understood: give an integer or an expression in p or d",
        ),
        (Config(codes=CodesConfig(target_support="m/3")), "codes.target_support='m/3' is 1.33333 for m=4"),
        (Config(layer=40), "layer=40 is not in this model of 24 layers"),
    ],
)
def test_a_plan_that_cannot_be_says_why(config: Config, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(config, Model())
    assert says in str(caught.value)
