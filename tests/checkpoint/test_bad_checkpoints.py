"""Checkpoints and options that cannot be used: each ends in one sentence that names the trouble and a remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import globe
from globe.checkpoint import open_checkpoint
from globe.errors import CheckpointError, GlobeError

UP = "model.layers.1.mlp.experts.{}.up_proj.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"
INDEX = "model.safetensors.index.json"


def configured(folder: Path, **changes: Any) -> Path:
    """The config with changes; a value of ... removes its key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def copy(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def get(model_type: str = "qwen2_moe", **options: Any) -> Path:
        return Path(shutil.copytree(tiny_checkpoint(model_type, **options), tmp_path / "copy"))

    return get


def refusal(action: Callable[[], object], *parts: str) -> str:
    """The sentence an action is refused with, which must hold all parts."""
    with pytest.raises(CheckpointError) as caught:
        action()
    text = str(caught.value)
    for part in parts:
        assert part in text
    assert "\n" not in text
    assert isinstance(caught.value, GlobeError)
    assert re.search(r"(:|together,) (add|choose|convert|correct|give|remove|save|set) ", text), (
        f"no remedy in: {text}"
    )
    return text


def reading(folder: Path, layer: int = 1, family: str = "up", **options: Any) -> Callable[[], object]:
    return lambda: open_checkpoint(str(folder)).read_experts(layer, family, **options)


def test_no_config(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "config.json").unlink()
    refusal(reading(folder), "has no config.json")
    (folder / "inner").mkdir()
    (folder / "inner" / "config.json").write_text("{}")
    refusal(reading(folder), "give its folder inner, which has one")


@pytest.mark.parametrize("text", ["{", "\x00", "nonsense"])
def test_config_is_not_json(copy: Callable[..., Path], text: str) -> None:
    folder = copy()
    (folder / "config.json").write_text(text)
    refusal(reading(folder), "config.json is not readable JSON", "download it again")


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"model_type": 3}'])
def test_config_names_no_model_type(copy: Callable[..., Path], text: str) -> None:
    folder = copy()
    (folder / "config.json").write_text(text)
    refusal(reading(folder), "names no model_type")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "../mixtral", ""])
def test_unknown_architecture(copy: Callable[..., Path], model_type: str) -> None:
    folder = configured(copy(), model_type=model_type)
    refusal(
        reading(folder), f"model_type={model_type!r} is none of the", "nearest: ", f"add {model_type}.json to"
    )


def test_a_model_type_that_is_not_the_files(copy: Callable[..., Path]) -> None:
    folder = configured(copy(), model_type="mixtral")
    refusal(
        reading(folder), "model_type='mixtral'", "block_sparse_moe", "give a checkpoint of the whole model"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "globe_qwen2_moe", "quantization_config": {"globe_version": 1, "banks": []}},
        {"quantization_config": {"quant_method": "globe"}},
    ],
)
def test_a_compact_checkpoint_is_named_as_what_it_is(
    copy: Callable[..., Path], changes: dict[str, Any]
) -> None:
    folder = configured(copy(), **changes)
    text = refusal(reading(folder), "is compressed by GloBE already: give the original checkpoint")
    assert "globe.load(THIS, dequantize=True).save_pretrained(FOLDER)" in text


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "bitsandbytes"])
def test_quantised_by_its_config(copy: Callable[..., Path], method: str) -> None:
    folder = configured(copy(), quantization_config={"quant_method": method})
    refusal(
        reading(folder), f"quantised with {method!r}, but they are not", "remove its key quantization_config"
    )
    name = UP.format(3)
    rewritten(folder, lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(1, 1)}))
    told = ["does not read (it reads fp8", "convert it to bfloat16 first"]
    refusal(reading(folder), *(told if method == "bitsandbytes" else ["but they are not"]), repr(method))


def test_quantised_in_the_text_part(copy: Callable[..., Path]) -> None:
    folder = configured(copy(), text_config={"quantization_config": {"quant_method": "fp8"}})
    refusal(reading(folder), "quantised with 'fp8'")
    refusal(reading(configured(folder, quantization_config=3)), "quantised with 'unknown'")


def test_compressed_by_globe_already(copy: Callable[..., Path]) -> None:
    folder = configured(copy(), quantization_config={"quant_method": "globe"})
    refusal(reading(folder), "compressed by GloBE already", "give the original checkpoint")


def test_fp8_by_its_tensors(copy: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if ".experts." in name:
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    folder = rewritten(copy(), change)
    refusal(reading(folder), "torch.float8_e4m3fn", "quantised", "convert the checkpoint to bfloat16 first")


def test_mxfp4_by_its_names(copy: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [one for one in tensors if "experts" in one and "bias" not in one]:
            del tensors[name]
            tensors[f"{name}_blocks"] = torch.zeros(6, 40, 1, 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.zeros(6, 40, 1, dtype=torch.uint8)

    folder = rewritten(copy("gpt_oss"), change)
    refusal(reading(folder), "holds quantised experts", "convert them to bfloat16 first")


def test_missing_shard(copy: Callable[..., Path]) -> None:
    folder = copy(max_shard_size="20KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    refusal(reading(folder), f"lacks {victim.name}, which its index names", "download the checkpoint again")


def test_index_names_an_absent_tensor(copy: Callable[..., Path]) -> None:
    folder = copy(max_shard_size="20KB")
    index = json.loads((folder / INDEX).read_text())
    shard = index["weight_map"][UP.format(0)]
    index["weight_map"]["model.ghost"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    refusal(reading(folder), f"names model.ghost, which {shard} lacks", "download the checkpoint again")


def test_truncated_file(copy: Callable[..., Path]) -> None:
    folder = copy()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refusal(reading(folder), "model.safetensors is truncated or damaged", "download it again")


def test_one_expert_of_another_shape(copy: Callable[..., Path]) -> None:
    folder = rewritten(copy(), lambda tensors: tensors.update({UP.format(3): torch.ones(21, 24)}))
    refusal(reading(folder), f"{UP.format(3)} in", "[21, 24]", "expert 0 is torch.float32 [20, 24]")


def test_one_expert_of_another_dtype(copy: Callable[..., Path]) -> None:
    folder = rewritten(copy(), lambda tensors: tensors.update({UP.format(3): torch.ones(20, 24).half()}))
    refusal(reading(folder), f"{UP.format(3)} in", "torch.float16", "torch.float32")


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"moe_intermediate_size": 22}])
@pytest.mark.parametrize("family", ["gate", "up", "down"])
def test_shapes_against_the_config(copy: Callable[..., Path], changes: dict[str, int], family: str) -> None:
    folder = configured(copy(), **changes)
    (value,) = changes.values()
    refusal(reading(folder, family=family), "where config.json promises", str(value), "download both again")


def test_transposed_matrices_are_noticed(copy: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for expert in range(6):
            tensors[UP.format(expert)] = tensors[UP.format(expert)].T.contiguous()

    refusal(reading(rewritten(copy(), change)), "24 x 20", "20 x 24")


def test_a_vector_for_a_matrix(copy: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for expert in range(6):
            tensors[UP.format(expert)] = torch.ones(24)

    refusal(reading(rewritten(copy(), change)), "shape [24] where 2 axes are due")


def test_an_odd_number_of_rows_in_a_fused_tensor(copy: Callable[..., Path]) -> None:
    folder = copy(upstream=False)
    rewritten(folder, lambda tensors: tensors.update({FUSED: torch.ones(6, 41, 24)}))
    refusal(reading(folder), "41 rows, which gate and up cannot share")


@pytest.mark.parametrize("family", ["gate", "up", "down"])
def test_a_missing_expert(copy: Callable[..., Path], family: str) -> None:
    name = f"model.layers.1.mlp.experts.3.{family}_proj.weight"
    folder = rewritten(copy(), lambda tensors: tensors.pop(name))
    for asked in ("gate", "up", "down"):  # the other families are no good without it
        refusal(reading(folder, family=asked), f"3 of {family}", "6 of", "than the 6 promised")


def test_more_experts_than_promised(copy: Callable[..., Path]) -> None:
    folder = configured(copy(), num_experts=5)
    refusal(reading(folder), "has 6 experts where config.json promises 5")


def test_fewer_experts_in_a_fused_tensor(copy: Callable[..., Path]) -> None:
    folder = copy(upstream=False)
    rewritten(folder, lambda tensors: tensors.update({FUSED: torch.ones(5, 40, 24)}))
    refusal(reading(folder), "5 of gate, 5 of up, 6 of down", "than the 6 promised")


def test_a_fused_half_without_its_down(copy: Callable[..., Path]) -> None:
    folder = copy(upstream=False)
    rewritten(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj"))
    refusal(reading(folder), "6 of gate, 6 of up, 0 of down")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(copy: Callable[..., Path], bad: float, dtype: torch.dtype) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[UP.format(4)][13, 7] = bad

    folder = rewritten(copy(dtype=dtype), change)
    refusal(reading(folder), "NaN or infinite weights (layer 1, up, expert 4)", "download it again")
    assert open_checkpoint(str(folder)).read_experts(1, "up", max_experts=4).weights.isfinite().all()


@pytest.mark.parametrize("layer", [2, 99, -1])
def test_layer_out_of_range(tiny_checkpoint: Callable[..., Path], layer: int) -> None:
    refusal(
        reading(tiny_checkpoint("mixtral"), layer), f"layer={layer} is out of range", "give one of 0 to 1"
    )


@pytest.mark.parametrize(
    ("model_type", "layer", "good"), [("deepseek_v3", 0, "choose from 1"), ("jamba", 2, "choose from 1, 3")]
)
def test_dense_layer(tiny_checkpoint: Callable[..., Path], model_type: str, layer: int, good: str) -> None:
    refusal(reading(tiny_checkpoint(model_type), layer), f"layer={layer} of", "no routed experts", good)
    with pytest.raises(CheckpointError, match="no routed experts"):
        globe.extract_expert_weights(str(tiny_checkpoint(model_type)), single_layer=layer)


def test_layers_to_choose_from_are_named_in_runs(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("deepseek_v2", num_hidden_layers=5, first_k_dense_replace=2)
    refusal(reading(folder, 0), "choose from 2-4")


@pytest.mark.parametrize("family", ["both", "w1", ""])
def test_unknown_family(tiny_checkpoint: Callable[..., Path], family: str) -> None:
    refusal(
        reading(tiny_checkpoint("mixtral"), family=family), f"family={family!r}", "choose one of gate, up"
    )


def test_a_family_the_model_lacks(tiny_checkpoint: Callable[..., Path]) -> None:
    refusal(
        reading(tiny_checkpoint("nemotron_h"), 0, "gate"), "the experts of nemotron_h have no gate matrix"
    )


@pytest.mark.parametrize("number", [0, -3])
def test_max_experts(tiny_checkpoint: Callable[..., Path], number: int) -> None:
    refusal(reading(tiny_checkpoint("mixtral"), max_experts=number), f"model.max_experts={number}")


def test_sample_method(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral")
    refusal(
        reading(folder, sample_method="random"), "model.sample_method='random'", "first_n or evenly_spaced"
    )


def test_shared_expert_of_another_size(tiny_checkpoint: Callable[..., Path]) -> None:
    refusal(
        reading(tiny_checkpoint("qwen2_moe"), include_shared=True),
        "model.include_shared=true",
        "28 x 24",
        "20 x 24",
        "set it to false",
    )


def test_no_shared_expert(tiny_checkpoint: Callable[..., Path]) -> None:
    refusal(reading(tiny_checkpoint("mixtral"), include_shared=True), "no shared expert", "set it to false")


def test_expert_out_of_range(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("mixtral")))
    refusal(lambda: checkpoint.locate(0, "up", 6), "expert 6 is out of range for layer 0: give one of 0 to 5")
