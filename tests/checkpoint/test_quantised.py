"""Quantised checkpoints read as the plain ones that the public libraries make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantised_models as made
from globe.checkpoint import Checkpoint, open_checkpoint
from globe.checkpoint.hub import Source
from globe.checkpoint.quantised.scales import spread, steps
from globe.checkpoint.quantised.schemes import METHODS
from globe.checkpoint.quantised.unpacking import unpack
from globe.errors import CheckpointError

FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[str, Tensor], Any]]] = {
    "fp8": ("deepseek_v3", made.FP8, made.fp8_blocks),
    "fp8 stacked": ("qwen3_moe", made.FP8, made.fp8_blocks),
    "fbgemm": ("qwen3_moe", made.FBGEMM, made.fbgemm),
    "fbgemm stacked": ("gpt_oss", made.FBGEMM, made.fbgemm),
    "compressed act order": ("qwen3_moe", made.ACT_ORDER, made.act_order),
    "mxfp4": ("gpt_oss", made.MXFP4, made.mxfp4),
    "awq": ("mixtral", made.AWQ, made.awq),
    "gptq 3 bits": ("mixtral", made.gptq_config(3), made.gptq(3)),
    "gptq v2": ("mixtral", made.gptq_config(4, version="gptq_v2"), made.gptq(4, version="gptq_v2")),
    "gptq 2 bits": ("qwen3_moe", made.gptq_config(2, desc_act=False), made.gptq(2, desc_act=False)),
    "gptq 8 bits": ("qwen3_moe", made.gptq_config(8), made.gptq(8)),
    "modelopt": ("qwen3_moe", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, made.modelopt),
    **{
        f"compressed {kind}": ("qwen3_moe", made.compressed_config(kind), made.compressed(kind))
        for kind in made.COMPRESSED
    },
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """Family -> folder of a quantised checkpoint, and its plain tensors by the library; written once, to be read."""
    known: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def get(family: str) -> tuple[Path, dict[str, Tensor]]:
        if family not in known:
            folder = tmp_path_factory.mktemp("quantised")
            known[family] = (
                folder,
                made.write_quantised(folder, *FAMILIES[family], upstream="stacked" not in family),
            )
        return known[family]

    return get


@pytest.fixture
def changed(written: Callable[[str], tuple[Path, dict[str, Tensor]]], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint with tensors changed by a function, and keys of its quantization_config."""

    def get(family: str, change: Callable[[dict[str, Tensor]], None] | None = None, **keys: Any) -> Path:
        source = written(family)[0]
        tensors = {
            name: one for file in source.glob("*.safetensors") for name, one in load_file(file).items()
        }
        if change is not None:
            change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] |= keys
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_that_of_the_library(
    family: str, written: Callable[[str], tuple[Path, dict[str, Tensor]]]
) -> None:
    folder, expected = written(family)
    checkpoint = open_checkpoint(str(folder))
    reader, stored = checkpoint.reader, checkpoint.stored
    assert set(reader.names) == set(expected)
    quantised = set(expected) - set(stored.names) or {
        name for name in expected if stored.dtype(name) is not reader.dtype(name)
    }
    assert len(quantised) >= 4  # the stacks of gpt-oss; elsewhere every linear layer
    for name, tensor in expected.items():
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(reader.read(name), tensor), name
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.total_parameters == sum(tensor.numel() for tensor in expected.values())
    assert checkpoint.stored_bytes < checkpoint.plain_bytes == sum(one.nbytes for one in expected.values())


@pytest.mark.parametrize("family", ["fp8", "mxfp4", "awq", "compressed int4 asymmetric"])
def test_experts_come_as_from_the_plain_checkpoint(
    family: str, written: Callable[[str], tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, expected = written(family)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(expected, tmp_path / "model.safetensors")
    quantised, plain = open_checkpoint(str(folder)), open_checkpoint(str(tmp_path))
    assert quantised.moe_layers == plain.moe_layers
    for layer in plain.moe_layers:
        for name in ("gate", "up", "down"):
            assert quantised.shape(layer, name) == plain.shape(layer, name)
            mine = quantised.read_experts(
                layer, name, max_experts=4, sample_method="evenly_spaced", rows=slice(1, 3)
            )
            theirs = plain.read_experts(
                layer, name, max_experts=4, sample_method="evenly_spaced", rows=slice(1, 3)
            )
            assert torch.equal(mine.weights, theirs.weights)
            assert mine.names == theirs.names


def test_of_a_stack_only_the_experts_asked_for_are_read(
    written: Callable[[str], tuple[Path, dict[str, Tensor]]],
) -> None:
    checkpoint = open_checkpoint(str(written("mxfp4")[0]))
    before = checkpoint.bytes_read
    checkpoint.read_experts(1, "up", max_experts=1)
    one = 128 * 96 // 2 + 128 * 96 // 32  # bytes of gate and up of an expert, and its exponents
    assert checkpoint.bytes_read - before == one
    name = "model.layers.1.mlp.experts.down_proj"
    whole = checkpoint.reader.read(name)
    for index in (slice(2, 5), (3, slice(0, 7)), (slice(None), 5), -1):
        assert torch.equal(checkpoint.reader.read(name, index), whole[index])


def test_headers_suffice_to_know_the_sizes(written: Callable[[str], tuple[Path, dict[str, Tensor]]]) -> None:
    for family in ("fp8", "mxfp4", "compressed int4 channel", "gptq 3 bits"):
        folder = written(family)[0]
        here = open_checkpoint(str(folder))
        headers = {}
        for file in folder.glob("*.safetensors"):
            raw = file.read_bytes()
            headers[file.name] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        away = Checkpoint(Source(folder, "owner/name", None, headers))
        layer = here.moe_layers[-1]
        assert away.shape(layer, "down") == here.shape(layer, "down")
        assert away.total_parameters == here.total_parameters


def test_a_hash_covers_the_scales(changed: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    before = open_checkpoint(str(changed("fp8"))).hash_tensors([name])

    def other_scale(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}_scale_inv"][0, 0] *= 2

    assert open_checkpoint(str(changed("fp8", other_scale))).hash_tensors([name]) != before


def test_scales_of_activations_and_the_cache_are_dropped(changed: Callable[..., Path]) -> None:
    def with_others(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_scale"] = torch.ones(())
        tensors["model.layers.1.mlp.experts.0.up_proj.input_scale"] = torch.ones(1)
        tensors["model.logit_scale"] = torch.ones(1)  # the model's own

    names = open_checkpoint(str(changed("compressed fp8 tensor", with_others))).reader.names
    assert "model.logit_scale" in names
    assert not [name for name in names if name.endswith(("k_scale", "input_scale"))]


def test_the_blocks_at_the_edge_may_be_cut_off() -> None:
    scale = torch.arange(1.0, 7.0).view(3, 2)  # of 5 x 7 numbers in blocks of 2 x 4
    assert steps((5, 7), (3, 2), (2, 4)) == (2, 4)
    wide = spread(scale, (5, 7), (2, 4))
    for i in range(5):
        for j in range(7):
            assert wide[i, j] == scale[i // 2, j // 4]
    for shape in ((4, 2), (3, 3), (2, 2, 2)):
        with pytest.raises(ValueError, match="scales"):
            steps((5, 7), shape, (2, 4))


def test_words_of_whole_integers_as_older_files_have_them() -> None:
    numbers = torch.arange(32)[None] * 5 % 8
    words = [
        sum(int(one) << (3 * at) for at, one in enumerate(numbers[0, k : k + 10])) for k in range(0, 32, 10)
    ]
    assert torch.equal(unpack(torch.tensor([words], dtype=torch.int32), 3, 32), numbers)


def refusal(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder)).read_experts(1, "up")
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


NEEDED = [
    ("fp8", "model.layers.1.mlp.experts.2.up_proj.weight", "weight_scale_inv"),
    ("compressed int4 group", "model.layers.1.mlp.experts.2.up_proj.weight_packed", "weight_scale"),
    ("gptq v2", "model.layers.1.block_sparse_moe.experts.2.w3.qweight", "w3.qzeros"),
    ("awq", "model.layers.1.block_sparse_moe.experts.2.w3.qweight", "w3.scales"),
    ("mxfp4", "model.layers.1.mlp.experts.gate_up_proj_blocks", "gate_up_proj_scales"),
]


@pytest.mark.parametrize(("family", "main", "part"), NEEDED)
def test_missing_scales(family: str, main: str, part: str, changed: Callable[..., Path]) -> None:
    def without(tensors: dict[str, Tensor]) -> None:
        del tensors[
            next(name for name in tensors if name.startswith(main.rsplit(".", 1)[0]) and name.endswith(part))
        ]

    refusal(
        changed(family, without),
        main,
        f"lacks {main.rsplit('.', 1)[0]}",
        part,
        "download the checkpoint again",
    )


@pytest.mark.parametrize(
    ("family", "main", "part"), [*NEEDED, ("compressed nvfp4", NEEDED[1][1], "weight_scale")]
)
def test_scales_of_another_shape(family: str, main: str, part: str, changed: Callable[..., Path]) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        name = next(one for one in tensors if one.startswith(main.rsplit(".", 1)[0]) and one.endswith(part))
        tensors[name] = tensors[name][..., :-1].repeat_interleave(2, -1).contiguous()

    refusal(changed(family, cut), main.rsplit(".", 1)[0], "scales", "checkpoint again")


def test_values_that_contradict_each_other(changed: Callable[..., Path]) -> None:
    def far_group(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.experts.0.w3.g_idx"][5] = 9

    refusal(changed("gptq v2", far_group), "experts.0.w3.weight", "g_idx names groups other than 0 to 2")

    def other_shape(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.0.up_proj.weight_shape"][1] -= 1

    refusal(changed("compressed int4 group", other_shape), "says [64, 95]", "[64, 96] numbers")


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("fp8", {"quant_method": "bitsandbytes"}, ["'bitsandbytes', which GloBE does not read", *METHODS]),
        ("fp8", {"weight_block_size": [32]}, ["weight_block_size [32] is no pair"]),
        ("fp8", {"weight_block_size": [48, 16]}, ["do not fit together"]),
        ("gptq v2", {"checkpoint_format": "marlin"}, ["checkpoint_format 'marlin'"]),
        ("gptq v2", {"bits": "four"}, ["bits 'four' is no integer from 2 to 8"]),
        ("awq", {"version": "gemv"}, ["version='gemv'"]),
        ("compressed int4 group", {"format": "marlin-24"}, ["format 'marlin-24'", "pack-quantized"]),
        ("compressed int4 group", {"config_groups": {}}, ["has no config_groups"]),
        ("compressed int4 group", {"config_groups": {"a": {"weights": [3]}}}, ["weights are no object"]),
        ("compressed int4 group", {"config_groups": {"a": {"targets": {"b": 1}}}}, ["targets are no list"]),
        ("compressed int4 group", {"config_groups": {"a": {"targets": ["re:("]}}}, ["not read", "convert"]),
        ("compressed int4 group", {"config_groups": {"a": {"targets": ["re:(a+)+$"]}}}, ["repeats too much"]),
        ("compressed int4 group", {"config_groups": {"a": {"targets": ["re:" + ".*" * 9]}}}, ["repeats"]),
        (
            "compressed int4 group",
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            ["sparse-24-bitmask"],
        ),
    ],
)
def test_what_the_config_says_and_is_not_read(
    family: str, keys: dict[str, Any], words: list[str], changed: Callable[..., Path]
) -> None:
    refusal(changed(family, **keys), *words)


def test_targets_that_take_too_long_are_given_up(
    changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("globe.checkpoint.quantised.schemes._LONGEST_MATCHING", 0.0)
    monkeypatch.setattr("globe.checkpoint.quantised.schemes._LONGEST_EACH", 0.0)
    groups = made.compressed_config("int4 group")["config_groups"]
    other = {"targets": ["re:.*x.*y.*z"], "weights": {"num_bits": 8}}
    refusal(changed("compressed int4 group", config_groups=groups | {"b": other}), "take too long")


def test_kimi_k2_is_read_as_the_deepseek_v3_it_is(
    written: Callable[[str], tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, expected = written("fp8")
    for file in folder.glob("*.safetensors*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2"}))
    checkpoint = open_checkpoint(str(tmp_path))
    experts = checkpoint.read_experts(1, "down").weights
    for expert, matrix in enumerate(experts):
        assert torch.equal(matrix, expected[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].T)
    assert "kimi_k2 can't run with factors" in (checkpoint.dense_only or "")


def test_groups_of_other_bits_by_name(
    changed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    narrow, wide = made.compressed("int4 group"), made.compressed("int8 packed")
    both = made.compressed_config("int4 group")
    both["config_groups"]["group_1"] = made.compressed_config("int8 packed")["config_groups"]["group_0"] | {
        "targets": ["re:.*down_proj", "model.layers.0.self_attn.o_proj"]
    }
    folder = tmp_path_factory.mktemp("mixed")
    expected = made.write_quantised(
        folder,
        "qwen3_moe",
        both,
        lambda module, weight: (
            wide if "down" in module or module.endswith("0.self_attn.o_proj") else narrow
        )(module, weight),
    )
    reader = open_checkpoint(str(folder)).reader
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor), name
