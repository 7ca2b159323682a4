"""The reader against what transformers writes, for every architecture, layout, dtype and sharding."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import globe
import globe.embedded
from globe.checkpoint import ExpertShape, known_model_types, open_checkpoint
from globe.checkpoint.experts import choose_experts
from globe.errors import CheckpointError
from tiny_models import EXPERTS, HIDDEN, INTERMEDIATE, TINY

FAMILIES = ("gate", "up", "down")
OWN_NAMES = {"gate": "gate_proj|w1", "up": "up_proj|w3", "down": "down_proj|w2"}
TRANSPOSED = ("gpt_oss", "llama4", "llama4_text")
WITHOUT_GATE = ("nemotron_h",)
MOE_LAYERS = {
    **dict.fromkeys(TINY, (0, 1)),
    **dict.fromkeys(
        ("afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe"), (1,)
    ),
    **dict.fromkeys(("glm4_moe_lite", "lfm2_moe"), (1,)),
    "jamba": (1, 3),
    "nemotron_h": (0,),
}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def by_name(tensors: dict[str, Tensor], model_type: str, layer: int, family: str) -> Tensor:
    """The experts as a person would pick them out of a listing of the file, without the table; down transposed."""
    if model_type == "dbrx":
        stored = {"gate": "w1", "up": "v1", "down": "w2"}[family]
        rows = tensors[f"transformer.blocks.{layer}.ffn.experts.mlp.{stored}"]
        return torch.stack([rows[k * INTERMEDIATE :][:INTERMEDIATE] for k in range(EXPERTS)])
    mine = {name: t for name, t in tensors.items() if f".layers.{layer}." in name and "shared" not in name}
    own = {}
    for name, tensor in mine.items():
        if match := re.search(rf"experts\.(\d+)\.({OWN_NAMES[family]})\.weight$", name):
            own[int(match[1])] = tensor
    if own:
        assert sorted(own) == list(range(EXPERTS))
        stacked = torch.stack([own[expert] for expert in range(EXPERTS)])
        return stacked.transpose(1, 2) if family == "down" else stacked
    ends = ("experts.down_proj", "output_linear.weight") if family == "down" else ()
    ends = ends or ("experts.gate_up_proj", "input_linear.weight")
    if model_type in WITHOUT_GATE and family == "up":
        ends = ("experts.up_proj",)
    (whole,) = [tensor for name, tensor in mine.items() if name.endswith(ends)]
    if model_type in TRANSPOSED:
        whole = whole.transpose(1, 2)
    if family == "down":
        return whole.transpose(1, 2)
    if model_type in WITHOUT_GATE:
        return whole
    if model_type == "gpt_oss":
        return whole[:, 0::2] if family == "gate" else whole[:, 1::2]
    return whole[:, :INTERMEDIATE] if family == "gate" else whole[:, INTERMEDIATE:]


def test_every_known_architecture_has_a_tiny_model() -> None:
    # the checkpoint of Kimi K2 is written by hand in test_quantised.py
    assert sorted([*TINY, "kimi_k2"]) == list(known_model_types())


@pytest.mark.parametrize("upstream", [True, False], ids=["upstream", "memory"])
@pytest.mark.parametrize("model_type", TINY)
def test_every_architecture_in_both_layouts(
    tiny_checkpoint: Callable[..., Path], model_type: str, upstream: bool
) -> None:
    folder = tiny_checkpoint(model_type, upstream=upstream)
    tensors = all_tensors(folder)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.model_type == model_type
    assert checkpoint.moe_layers == MOE_LAYERS[model_type]
    assert checkpoint.num_layers == (4 if model_type == "jamba" else 2)
    for layer in checkpoint.moe_layers:
        for family in FAMILIES:
            if model_type in WITHOUT_GATE and family == "gate":
                with pytest.raises(CheckpointError, match="no gate matrix"):
                    checkpoint.read_experts(layer, family)
                continue
            expected = by_name(tensors, model_type, layer, family)
            assert checkpoint.shape(layer, family) == ExpertShape(EXPERTS, INTERMEDIATE, HIDDEN)
            experts = checkpoint.read_experts(layer, family)
            assert experts.weights.is_contiguous()
            assert experts.indices == tuple(range(EXPERTS))
            assert torch.equal(experts.weights, expected)


@pytest.mark.parametrize("upstream", [True, False], ids=["upstream", "memory"])
@pytest.mark.parametrize("model_type", TINY)
def test_only_the_bytes_of_the_chosen_experts_are_read(
    tiny_checkpoint: Callable[..., Path], model_type: str, upstream: bool
) -> None:
    folder = str(tiny_checkpoint(model_type, upstream=upstream))
    for family in FAMILIES[1:] if model_type in WITHOUT_GATE else FAMILIES:
        checkpoint = open_checkpoint(folder)
        layer = checkpoint.moe_layers[-1]
        checkpoint.shape(layer, family)
        assert checkpoint.reader.bytes_read == 0
        experts = checkpoint.read_experts(layer, family, max_experts=3, sample_method="evenly_spaced")
        assert experts.indices == (0, 2, 5)
        everything = open_checkpoint(folder).read_experts(layer, family).weights
        assert torch.equal(experts.weights, everything[[0, 2, 5]])
        selected = 3 * INTERMEDIATE * HIDDEN * 4
        if model_type == "gpt_oss" and family != "down":
            # Rows of gate and up alternate: of every 2 I numbers all but the one at the far end lie between.
            selected = 3 * HIDDEN * (2 * INTERMEDIATE - 1) * 4
        assert checkpoint.reader.bytes_read == selected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("upstream", [True, False], ids=["upstream", "memory"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one", "sharded"])
def test_dtypes_and_shards(
    tiny_checkpoint: Callable[..., Path], dtype: torch.dtype, upstream: bool, shard: str
) -> None:
    folder = tiny_checkpoint("qwen2_moe", dtype=dtype, upstream=upstream, max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (shard != "5GB")
    tensors = all_tensors(folder)
    checkpoint = open_checkpoint(str(folder))
    for family in FAMILIES:
        experts = checkpoint.read_experts(1, family)
        assert experts.weights.dtype is dtype
        assert torch.equal(experts.weights, by_name(tensors, "qwen2_moe", 1, family))
    assert checkpoint.reader.bytes_read == 3 * EXPERTS * INTERMEDIATE * HIDDEN * dtype.itemsize
    assert checkpoint.total_parameters == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts resident pages as Linux does")
def test_a_slice_of_a_huge_tensor_costs_its_own_memory(tmp_path: Path) -> None:
    """One family of one expert out of a sparse file of 1 GiB: memory grows by a fraction of it."""
    shape, name = [16, 2 * 2048, 8192], "model.layers.0.mlp.experts.gate_up_proj"
    sizes = {name: shape, "model.layers.0.mlp.experts.down_proj": [16, 8192, 1]}
    header, offset = {}, 0
    for key, extents in sizes.items():
        stop = offset + 2 * extents[0] * extents[1] * extents[2]
        header[key] = {"dtype": "BF16", "shape": extents, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_hidden_layers": 1}')
    checkpoint = open_checkpoint(str(tmp_path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    experts = checkpoint.read_experts(0, "up", max_experts=1)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert experts.weights.shape == (1, 2048, 8192)
    assert checkpoint.reader.bytes_read == 2 * 2048 * 8192
    assert grown < 4 * 2 * 2048 * 8192


@pytest.mark.parametrize(("n", "k"), [(1, 1), (6, 1), (6, 2), (6, 5), (6, 6), (60, 12), (60, 7), (256, 255)])
def test_evenly_spaced_reaches_from_the_first_to_the_last(n: int, k: int) -> None:
    chosen = choose_experts(n, k, "evenly_spaced")
    assert len(set(chosen)) == k
    assert chosen == tuple(sorted(chosen))
    assert chosen[0] == 0
    if k > 1:
        assert chosen[-1] == n - 1
        gaps = [b - a for a, b in itertools.pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1


def test_first_n_and_more_than_there_are() -> None:
    assert choose_experts(6, 4, "first_n") == (0, 1, 2, 3)
    assert choose_experts(6, None, "first_n") == choose_experts(6, 9, "first_n") == tuple(range(6))
    assert choose_experts(6, 9, "evenly_spaced") == tuple(range(6))


@pytest.mark.parametrize("upstream", [True, False], ids=["upstream", "memory"])
@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("deepseek_v2", "model.layers.1.mlp.shared_experts.{}_proj.weight"),
        ("hunyuan_v1_moe", "model.layers.1.mlp.shared_mlp.{}_proj.weight"),
        ("llama4", "language_model.model.layers.1.feed_forward.shared_expert.{}_proj.weight"),
    ],
)
def test_the_shared_expert_comes_last(
    tiny_checkpoint: Callable[..., Path], model_type: str, name: str, upstream: bool
) -> None:
    folder = tiny_checkpoint(model_type, upstream=upstream)
    tensors = all_tensors(folder)
    checkpoint = open_checkpoint(str(folder))
    for family in FAMILIES:
        experts = checkpoint.read_experts(1, family, include_shared=True, max_experts=2)
        assert experts.indices == (0, 1, -1)
        assert experts.names[-1] == name.format(family)
        stored = tensors[name.format(family)]
        assert torch.equal(experts.weights[-1], stored.T if family == "down" else stored)


def test_the_shared_expert_of_granite_is_a_half_of_one_matrix(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("granitemoeshared", shared_intermediate_size=INTERMEDIATE)
    whole = all_tensors(folder)["model.layers.0.shared_mlp.input_linear.weight"]
    checkpoint = open_checkpoint(str(folder))
    for family, half in (("gate", whole[:INTERMEDIATE]), ("up", whole[INTERMEDIATE:])):
        experts = checkpoint.read_experts(0, family, include_shared=True)
        assert torch.equal(experts.weights[-1], half)


def test_layers_past_the_last_are_no_part_of_the_model(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """DeepSeek-V3's files hold one more layer, for predicting two tokens ahead."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("deepseek_v3"), folder)
    tensors = load_file(folder / "model.safetensors")
    extra = {name.replace(".1.mlp", ".2.mlp"): t.clone() for name, t in tensors.items() if ".1.mlp" in name}
    save_file(tensors | extra, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.num_layers, checkpoint.moe_layers) == (2, (1,))
    with pytest.raises(CheckpointError, match=r"layer=2 is out of range for .*: give one of 0 to 1"):
        checkpoint.shape(2, "up")


@pytest.mark.parametrize("keys", [("num_hidden_layers",), ("num_local_experts", "moe_intermediate_size")])
def test_a_config_that_says_less_is_enough(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """Upstream configs leave out what equals the class default."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), folder)
    config = json.loads((folder / "config.json").read_text())
    for key in keys:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.num_layers, checkpoint.moe_layers) == (2, (0, 1))
    assert checkpoint.shape(1, "gate") == ExpertShape(EXPERTS, INTERMEDIATE, HIDDEN)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_a_size_under_either_of_its_keys(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    """Qwen3-30B-A3B says num_experts; transformers 5 writes the same number as num_local_experts."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(config | {key: EXPERTS + 2}))
    with pytest.raises(CheckpointError, match="promises 8"):
        open_checkpoint(str(folder)).shape(0, "up")


def test_a_size_given_per_layer(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("hunyuan_v1_moe"), folder)
    config = json.loads((folder / "config.json").read_text())
    for experts, good in (([EXPERTS, EXPERTS], True), ([EXPERTS, EXPERTS + 1], False)):
        (folder / "config.json").write_text(json.dumps(config | {"num_experts": experts}))
        checkpoint = open_checkpoint(str(folder))
        assert checkpoint.shape(0, "up").n == EXPERTS
        if good:
            assert checkpoint.shape(1, "up").n == EXPERTS
        else:
            with pytest.raises(CheckpointError, match="promises 7"):
                checkpoint.shape(1, "up")


def test_hash_is_that_of_the_bytes_in_name_order(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("qwen2_moe", max_shard_size="20KB", dtype=torch.bfloat16)
    tensors = all_tensors(folder)
    checkpoint = open_checkpoint(str(folder))
    names = checkpoint.read_experts(1, "gate").names
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(tensors[name].view(torch.int16).numpy().tobytes())
    assert checkpoint.hash_tensors(reversed((*names, names[0]))) == digest.hexdigest()


def test_source_says_where_it_came_from(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = str(tiny_checkpoint("mixtral"))
    assert open_checkpoint(folder).source() == {"id": folder, "revision": None, "model_type": "mixtral"}
    assert open_checkpoint(None).source() == {
        "id": "globe-tiny",
        "revision": None,
        "model_type": "qwen2_moe",
    }


def test_extract_expert_weights(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("jamba")
    tensors = all_tensors(folder)
    weights = globe.extract_expert_weights(str(folder), max_experts=4)
    assert sorted(weights) == ["gate", "up"]
    for family, matrices in weights.items():
        expected = torch.cat([by_name(tensors, "jamba", layer, family)[:4] for layer in (1, 3)])
        assert all(isinstance(one, Tensor) for one in matrices)
        assert torch.equal(torch.stack(matrices), expected)
    one = globe.extract_expert_weights(
        str(folder), single_layer=3, max_experts=2, sample_method="evenly_spaced"
    )
    assert torch.equal(torch.stack(one["up"]), by_name(tensors, "jamba", 3, "up")[[0, 5]])
    shared = globe.extract_expert_weights(str(tiny_checkpoint("dots1")), include_shared=True)
    assert len(shared["up"]) == EXPERTS + 1


def test_the_embedded_model_against_the_library() -> None:
    tensors = load_file(globe.embedded.path() / "model.safetensors")
    checkpoint = open_checkpoint(None)
    assert checkpoint.moe_layers == tuple(range(24))
    for layer, family in ((0, "up"), (12, "gate"), (23, "down")):
        name = f"model.layers.{layer}.mlp.experts.{{}}.{family}_proj.weight"
        expected = torch.stack([tensors[name.format(expert)] for expert in range(16)])
        expected = expected.mT if family == "down" else expected
        assert torch.equal(checkpoint.read_experts(layer, family).weights, expected)
    assert checkpoint.total_parameters == sum(tensor.numel() for tensor in tensors.values())
