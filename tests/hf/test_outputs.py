"""Over every architecture: the three outputs are the same model, and the one that the factors stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_runs import dense_experts, put_dense, random_run
from safetensors.torch import load_file
from torch import Tensor, nn

from globe.bank.file import read_artefact
from globe.checkpoint import open_checkpoint
from globe.errors import CheckpointError
from globe.hf import load, patch_model
from globe.hf.experts import GlobeExperts
from globe.patch import parse, patch
from tiny_models import TINY, VOCABULARY, load_tiny

FAST = ("qwen2_moe", "mixtral", "granitemoe")
"""One tensor an expert; another module name on disk than in memory; all experts in one tensor."""
IRREGULAR = {
    "dbrx": "no gate_up_proj",
    "gpt_oss": "transposed",
    "llama4": "gate_up_proj",
    "llama4_text": "no gate_up_proj",
    "nemotron_h": "no gate_up_proj",
    "qwen3_5_moe": "text part",
}
"""Experts that can't run factored, or not as a model of their own."""
IDS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def some_slow(model_types: list[str]) -> list[object]:
    return [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in model_types]


def families_of(model_type: str) -> tuple[str, ...]:
    return ("up", "down") if model_type == "nemotron_h" else ("up", "gate", "down")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def expected(source: Path, run: Path, model_type: str) -> nn.Module:
    """The original with its weights set in memory: neither our writers nor our names for tensors take part."""
    model = load_tiny(source, model_type)
    for folder in sorted((run / "banks").iterdir()):
        put_dense(model, dense_experts(read_artefact(folder)))
    return model


def write(run: Path, out: Path, form: str, **options: object) -> Path:
    patch(parse([f"run={run}", f"out={out}", f"format={form}", *(f"{k}={v}" for k, v in options.items())]))
    return out


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("model_type", some_slow(sorted(TINY)))
def test_dense_output_is_the_model_the_factors_stand_for(
    model_type: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny(model_type)
    run = random_run(source, tmp_path / "run", families_of(model_type))
    out = write(run, tmp_path / "dense", "dense")
    model, report = load_tiny_with_report(out, model_type)
    assert not any(report.values())
    reference = logits(expected(source, run, model_type))
    torch.testing.assert_close(logits(model), reference, atol=1e-5, rtol=0)
    # the banks are random, so a patch that did nothing would not pass
    assert (logits(load_tiny(source, model_type)) - reference).abs().max() > 1e-2
    assert {k: v.shape for k, v in stored(out).items()} == {k: v.shape for k, v in stored(source).items()}
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("model_type", some_slow(sorted(set(TINY) - set(IRREGULAR))))
def test_factored_outputs_equal_the_dense_one(
    model_type: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny(model_type)
    run = random_run(source, tmp_path / "run", families_of(model_type))
    layers = open_checkpoint(str(source)).moe_layers
    reference = logits(expected(source, run, model_type))
    out = write(run, tmp_path / "globe", "globe")

    loaded, report = load_tiny_with_report(out, model_type)
    assert not any(report.values())
    assert sum(isinstance(module, GlobeExperts) for module in loaded.modules()) == len(layers)
    torch.testing.assert_close(logits(loaded), reference, atol=1e-5, rtol=0)

    patched = patch_model(load_tiny(source, model_type), run)
    torch.testing.assert_close(logits(patched), reference, atol=1e-5, rtol=0)
    written_back = patch_model(load_tiny(source, model_type), run, dense=True)
    torch.testing.assert_close(logits(written_back), reference, atol=1e-5, rtol=0)

    # save -> load -> save is the identity, and the model patched in memory saves the same file
    loaded.save_pretrained(tmp_path / "again")
    patched.save_pretrained(tmp_path / "memory")
    for folder in ("again", "memory"):
        assert_same_tensors(stored(out), stored(tmp_path / folder))
        assert config(tmp_path / folder)["model_type"] == f"globe_{model_type}"
    again = load(tmp_path / "again")
    again.save_pretrained(tmp_path / "thrice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "thrice" / name).read_bytes()

    # dequantised, as it is loaded or afterwards, it is an ordinary model with the upstream's names
    for number, dense in enumerate((load(out, dequantize=True), again.dequantize())):
        assert not any(isinstance(module, GlobeExperts) for module in dense.modules())
        torch.testing.assert_close(logits(dense), reference, atol=1e-5, rtol=0)
        dense.save_pretrained(tmp_path / f"dense{number}")
        assert set(stored(tmp_path / f"dense{number}")) == set(stored(source))
        assert config(tmp_path / f"dense{number}")["model_type"] == model_type
        assert "quantization_config" not in config(tmp_path / f"dense{number}")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(IRREGULAR))
def test_irregular_experts_are_refused_with_the_way_out(
    model_type: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = random_run(tiny(model_type), tmp_path / "run", families_of(model_type))
    with pytest.raises(CheckpointError, match="format=dense"):
        write(run, tmp_path / "out", "globe")
    assert not (tmp_path / "out").exists()
    model = load_tiny(tiny(model_type), model_type)
    before = logits(model)
    if model_type != "qwen3_5_moe":
        with pytest.raises(CheckpointError, match="format=dense"):
            patch_model(model, run)
    torch.testing.assert_close(logits(model), before)


def load_tiny_with_report(folder: Path, model_type: str) -> tuple[nn.Module, dict[str, object]]:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if model_type in ("llama4", "qwen3_5_moe") else AutoModelForCausalLM
    return kind.from_pretrained(folder, output_loading_info=True)


def config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name
