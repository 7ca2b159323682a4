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
from torch import Tensor

import quantised_models as made
from globe.checkpoint import open_checkpoint
from globe.errors import CheckpointError
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
