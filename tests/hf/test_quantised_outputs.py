"""Models out of quantised checkpoints: dense and factored, loaded by transformers, against its own dequantisation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import lossless_bank, write_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantised_models as made
from globe.calibration.decoder import Decoder
from globe.checkpoint import open_checkpoint
from globe.errors import CheckpointError
from globe.evaluation.sizes import measure_sizes
from globe.evaluation.subject import open_subject
from globe.hf.loading import load
from globe.patch import parse, patch
from quantised_models import write_quantised

KINDS: dict[str, tuple[str, dict[str, Any], Callable[[str, Tensor], Any]]] = {
    "fp8": ("deepseek_v3", made.FP8, made.fp8_blocks),
    "mxfp4": ("gpt_oss", made.MXFP4, made.mxfp4),
    "int4": ("qwen3_moe", made.compressed_config("int4 group"), made.compressed("int4 group")),
    "gptq": ("mixtral", made.gptq_config(4), made.gptq(4)),
}
IDS = torch.tensor([[3, 11, 40, 7, 22, 5, 31, 2]])


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    known: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in known:
            known[kind] = tmp_path_factory.mktemp(kind)
            write_quantised(known[kind], *KINDS[kind])
            (known[kind] / "quantize_config.json").write_text("{}")
            (known[kind] / "generation_config.json").write_text('{"eos_token_id": 2, "top_k": 7}')
        return known[kind]

    return get


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_it_loads_as_transformers_dequantises_it(kind: str, checkpoint_of: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint_of(kind)
    mine = load(folder)
    assert mine.dtype is torch.bfloat16
    assert mine.generation_config.top_k == 7
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    theirs.set_experts_implementation("eager")
    mine.set_experts_implementation("eager")
    torch.testing.assert_close(logits(mine), logits(theirs), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "form"),
    [*((kind, "dense") for kind in KINDS), ("fp8", "globe"), ("int4", "globe"), ("gptq", "globe")],
)
def test_a_lossless_run_is_the_dequantised_model(
    kind: str, form: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint_of(kind)
    source = open_checkpoint(str(folder))
    places = [(layer, family) for layer in source.moe_layers for family in ("up", "gate")]
    run = write_run(tmp_path / "run", [lossless_bank(source, place) for place in places])
    out = tmp_path / "out"
    record = patch(parse([f"run={run}", f"out={out}", f"format={form}"]))
    assert record["left_out"] == ["quantize_config.json"]
    assert not (out / "quantize_config.json").exists()
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    assert (
        f"The original is quantised ({method}); here all its weights are bfloat16."
        in (out / "README.md").read_text()
    )
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert ("quantization_config" in config) == (form == "globe")
    dtypes = set()
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    assert dtypes <= {"BF16", "F32"}
    patched, original = load(out, dtype=torch.float32), load(folder, dtype=torch.float32)
    for model in (patched, original):
        model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(patched), logits(original), atol=0 if form == "dense" else 1e-5, rtol=0)


def test_gpt_oss_is_not_written_as_factors(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint_of("mxfp4")
    run = write_run(tmp_path / "run", [lossless_bank(open_checkpoint(str(folder)), (0, "up"))])
    with pytest.raises(
        CheckpointError, match=r"gpt_oss can't run with factors \(its experts have biases\).*use format=dense"
    ):
        patch(parse([f"run={run}", f"out={tmp_path / 'out'}", "format=globe"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mxfp4", "gptq"])
def test_a_calibration_runs_the_dequantised_layers(kind: str, checkpoint_of: Callable[[str], Path]) -> None:
    folder = checkpoint_of(kind)
    decoder = Decoder(
        open_checkpoint(str(folder)), dtype=torch.float32, device=torch.device("cpu"), head=True
    )
    hidden = None
    for layer in range(decoder.layers):
        with decoder.loaded(layer):
            hidden = decoder.step(layer, IDS, hidden)
    model = load(folder, dtype=torch.float32)
    model.set_experts_implementation("eager")
    assert hidden is not None
    torch.testing.assert_close(decoder.logits(IDS, hidden), logits(model), atol=1e-5, rtol=0)


def test_an_evaluation_counts_the_bytes_in_the_files(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint_of("fp8")
    source = open_checkpoint(str(folder))
    run = write_run(tmp_path / "run", [lossless_bank(source, (1, "up"))])
    subject, original = open_subject(str(run), "auto")
    assert original is not None
    one = torch.nn.Linear(2, 3)
    sizes = measure_sizes(subject, original, one, one)
    scales = 6 * (64 // 32) * (96 // 16) * 4
    assert sizes.family_bytes is not None
    assert sizes.family_bytes.before == 6 * 64 * 96 + scales
    assert (
        sizes.model_bytes.before
        == source.stored_bytes
        == sum(end - start for file in folder.glob("*.safetensors") for start, end in _offsets(file))
    )
    factors = 2 * (6 * 6 + 6 * 64 * 64 + 6 * 64 * 96)  # codes, adapters and atoms in bfloat16
    assert sizes.family_bytes.after == factors
    assert sizes.dense_bytes == source.plain_bytes
    assert sizes.model_bytes.after == source.plain_bytes - 2 * 6 * 64 * 96 + factors


def _offsets(file: Path) -> list[tuple[int, int]]:
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return [tuple(one["data_offsets"]) for name, one in header.items() if name != "__metadata__"]


def test_biases_of_zeros_that_gptq_adds_are_no_foreign_tensors(tmp_path: Path) -> None:
    write_quantised(tmp_path, "qwen3_moe", made.gptq_config(4), made.gptq(4))
    before = logits(load(tmp_path, dtype=torch.float32))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = "model.layers.0.mlp.experts.0.gate_proj.bias"
    file = tmp_path / "model-00001-of-00002.safetensors"
    for value, tolerated in ((0.0, True), (0.5, False)):
        save_file(load_file(file) | {name: torch.full((64,), value)}, file, metadata={"format": "pt"})
        index["weight_map"][name] = file.name
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        if tolerated:
            assert torch.equal(logits(load(tmp_path, dtype=torch.float32)), before)
        else:
            with pytest.raises(CheckpointError, match="tensors that are not of the model"):
                load(tmp_path, dtype=torch.float32)
