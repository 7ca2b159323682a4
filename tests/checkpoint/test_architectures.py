"""The architecture table: every file loads, and a malformed one is refused with a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from globe.checkpoint import known_model_types, load_architecture
from globe.checkpoint.architecture import FAMILIES, PREFIXES, Slot, parse_architecture, with_prefix
from globe.checkpoint.location import Location, find_layouts, named_as
from globe.errors import CheckpointError

REQUIRED = [
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "mixtral",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "phimoe",
    "granitemoe",
    "granitemoeshared",
    "glm4_moe",
    "ernie4_5_moe",
    "jamba",
    "lfm2_moe",
    "minimax",
    "dots1",
    "hunyuan_v1_moe",
    "flex_olmo",
    "qwen3_5_moe_text",
    "gpt_oss",
    "llama4_text",
]

GOOD: dict[str, Any] = {
    "model_type": "toy",
    "layouts": [
        {"gate": "l.{layer}.e.{expert}.g", "up": "l.{layer}.e.{expert}.u", "down": "l.{layer}.e.{expert}.d"}
    ],
    "shared": None,
    "config": {"layers": "layers", "experts": ["n", "experts"], "rows": None, "columns": "sub.hidden"},
}


def parsed(record: Any) -> Any:
    return parse_architecture(record if isinstance(record, str) else json.dumps(record), "toy.json", "toy")


def test_the_table_is_complete() -> None:
    assert set(REQUIRED) <= set(known_model_types())


@pytest.mark.parametrize("model_type", known_model_types())
def test_every_file_loads_and_its_layouts_differ(model_type: str) -> None:
    architecture = load_architecture(model_type)
    assert architecture.model_type == model_type
    assert architecture.config.experts
    slots = [layout.slot(family) for layout in architecture.layouts for family in FAMILIES]
    places = [(slot.template, slot.half) for slot in slots if slot is not None]
    assert len(set(places)) == len(places)


def test_a_good_record() -> None:
    architecture = parsed(GOOD)
    assert architecture.config.experts == ("n", "experts")
    assert architecture.config.rows == ()
    slot = architecture.layouts[0].slot("up")
    assert slot == Slot("l.{layer}.e.{expert}.u", None, False, False)
    assert slot.name(3, 5) == "l.3.e.5.u"
    assert not slot.fused


LAYOUT = GOOD["layouts"][0]
FUSED = {"gate_up": "{layer}.gu", "down": "{layer}.d"}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ("{", "is not JSON"),
        ([], "must be an object with the keys"),
        (GOOD | {"colour": 3}, "has the unknown key 'colour'"),
        ({k: v for k, v in GOOD.items() if k != "config"}, "lacks the key 'config'"),
        (GOOD | {"model_type": "other"}, "describes 'other': rename it"),
        (GOOD | {"layouts": []}, "has no layouts"),
        (GOOD | {"layouts": {}}, "has no layouts"),
        (GOOD | {"layouts": [3]}, "must be an object"),
        (GOOD | {"layouts": [LAYOUT | {"side": "{layer}"}]}, "unknown key 'side'"),
        (GOOD | {"layouts": [{"up": "{layer}"}]}, "lacks the key 'down'"),
        (GOOD | {"layouts": [{"down": "{layer}"}]}, "give either gate_up, or up"),
        (GOOD | {"layouts": [LAYOUT | FUSED]}, "give either gate_up, or up"),
        (GOOD | {"layouts": [FUSED | {"gate": "{layer}.g"}]}, "give either gate_up, or up"),
        (GOOD | {"layouts": [LAYOUT | {"interleaved": True}]}, "so it needs gate_up"),
        (GOOD | {"layouts": [LAYOUT | {"transposed": 1}]}, "transposed=1 must be true or false"),
        (GOOD | {"layouts": [LAYOUT | {"up": "no placeholder"}]}, "must be a tensor name with {layer}"),
        (GOOD | {"layouts": [LAYOUT | {"up": "{layer}.{bank}"}]}, "must be a tensor name with {layer}"),
        (GOOD | {"layouts": [LAYOUT | {"up": 3}]}, "must be a tensor name with {layer}"),
        (GOOD | {"shared": LAYOUT}, "shared: gate='l.{layer}.e.{expert}.g' must be a tensor name"),
        (GOOD | {"config": {}}, "config lacks the key"),
        (GOOD | {"config": GOOD["config"] | {"rows": 3}}, "rows=3 must be a key of config.json"),
        (GOOD | {"config": GOOD["config"] | {"rows": [3]}}, "must be a key of config.json"),
    ],
)
def test_malformed_records(record: Any, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parsed(record)
    assert str(caught.value).startswith("toy.json")
    assert sentence in str(caught.value)


def test_layers_may_have_different_layouts_and_one_layer_only_one() -> None:
    two = parsed(GOOD | {"layouts": [LAYOUT, FUSED]})
    names = ["l.1.e.0.u", "7.d", "l.3.e.12.g", "x.l.5.e.0.u", "l.x.e.0.u", "l.3.e.12.gg"]
    names += [f"l.{'9' * 5000}.e.0.u", "٣.d"]
    found = find_layouts(two, names)
    assert list(found) == [1, 3, 7]
    assert [found[layer] is two.layouts[0] for layer in found] == [True, True, False]
    with pytest.raises(
        CheckpointError, match=r"layer 1 are there twice, such as l\.1\.e\.0\.u and 1\.gu: remove one"
    ):
        find_layouts(two, [*names, "1.gu"])


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("model_type", ["qwen2_moe", "llama4", "qwen3_5_moe", "jamba", "nemotron_h", "dbrx"])
def test_experts_are_found_under_every_prefix_that_transformers_reads(model_type: str, prefix: str) -> None:
    known = load_architecture(model_type)
    other = with_prefix(known, prefix)
    name = other.layouts[0].down.format(layer=3, expert=0)
    assert name.startswith((f"{prefix}layers.3.", f"{prefix}blocks.3."))
    found = named_as(known, ["lm_head.weight", name])
    assert found.layouts[0] == other.layouts[0]
    assert found.shared == other.shared
    assert list(find_layouts(found, [name])) == [3]
    again = with_prefix(known, "model.model.model.").layouts[0].down.format(layer=3, expert=0)
    assert named_as(known, [again]) is known  # what is not understood is left as it is


def test_experts_under_two_prefixes_are_refused() -> None:
    known = load_architecture("qwen2_moe")
    names = [
        with_prefix(known, prefix).layouts[0].down.format(layer=3, expert=0) for prefix in ("", "model.")
    ]
    with pytest.raises(CheckpointError, match=r"names of two kinds, such as model\.layers.* and layers\."):
        named_as(known, names)


@pytest.mark.parametrize(
    ("place", "index"),
    [
        (Location("x", None, (0, 20), False, False), (slice(0, 20, 1), slice(None))),
        (Location("x", 4, (20, 40), False, False), (4, slice(20, 40, 1), slice(None))),
        (Location("x", 4, (1, 40), True, True), (4, slice(None), slice(1, 40, 2))),
    ],
)
def test_what_a_location_picks(place: Location, index: Any) -> None:
    assert place.index == index
