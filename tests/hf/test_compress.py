"""`globe.compress`: a model from a folder or in memory, with the experts that the commands would give it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import globe
from globe.errors import CheckpointError, ConfigError, GlobeError
from globe.hf.experts import GlobeExperts
from run_support import run_in
from tiny_models import VOCABULARY, load_tiny, tiny_model

TOKENS = torch.tensor([[5, 3, 17, 29, 8, 36, 11]])
FEW: dict[str, Any] = {"kept": None, "steps": 3, "overrides": ["bank.m=2", "bank.r=7"]}


def test_a_folder_and_the_model_in_memory_give_what_the_commands_give(
    tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    source = tiny("qwen3_moe")
    words = ["family=both", "layer=all", "bank.m=2", "bank.r=7", "train.steps=3"]
    _, run = run_in(tmp_path, f"model.path={source}", *words)
    expected = globe.patch_model(load_tiny(source, "qwen3_moe"), run)
    from_folder = globe.compress(source, **FEW)
    model = load_tiny(source, "qwen3_moe")
    in_memory = globe.compress(model, **FEW)
    assert in_memory is model
    with torch.no_grad():
        logits = expected(TOKENS).logits
        assert logits.shape[-1] == VOCABULARY
        torch.testing.assert_close(from_folder(TOKENS).logits, logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(in_memory(TOKENS).logits, logits, rtol=0, atol=1e-5)
        assert not torch.allclose(load_tiny(source, "qwen3_moe")(TOKENS).logits, logits)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "olmoe"])
def test_only_what_is_asked_for_is_compressed(model_type: str) -> None:
    model = tiny_model(model_type)
    whole = sum(one.numel() for one in model.parameters())
    kept = globe.compress(model, layers=1, families=["up"], **FEW)
    modules = [name for name, one in kept.named_modules() if isinstance(one, GlobeExperts)]
    assert len(modules) == 1
    assert ".1." in modules[0]
    assert sum(one.numel() for one in kept.parameters()) < whole
    assert torch.isfinite(kept(TOKENS).logits).all()


def test_all_three_families_of_a_model_in_memory(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    source = tiny("mixtral")
    _, run = run_in(
        tmp_path, f"model.path={source}", "family=all", "layer=all", *FEW["overrides"], "train.steps=3"
    )
    expected = globe.patch_model(load_tiny(source, "mixtral"), run)
    model = globe.compress(load_tiny(source, "mixtral"), families=("up", "gate", "down"), **FEW)
    torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=0, atol=1e-5)


def test_banks_stay_in_a_folder_and_are_taken_from_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = globe.compress(tiny_model("mixtral"), folder=folder, **FEW)
    banks = sorted(path.parent.name for path in folder.glob("banks/*/bank.safetensors"))
    assert banks == ["layer000.gate", "layer000.up", "layer001.gate", "layer001.up"]
    times = {path: path.stat().st_mtime_ns for path in folder.glob("banks/*/bank.safetensors")}
    again = globe.compress(tiny_model("mixtral"), folder=folder, **FEW)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    torch.testing.assert_close(first(TOKENS).logits, again(TOKENS).logits, rtol=0, atol=1e-5)
    patched = globe.patch_model(tiny_model("mixtral"), folder)
    torch.testing.assert_close(first(TOKENS).logits, patched(TOKENS).logits, rtol=0, atol=1e-5)


def test_a_budget_and_a_cache(tmp_path: Path) -> None:
    model = globe.compress(
        "embedded", kept=0.6, layers=[3], steps=12, S_cache=0, overrides=["budget.seconds=0.5"]
    )
    original = globe.load("embedded")
    assert sum(one.numel() for one in model.parameters()) < sum(one.numel() for one in original.parameters())
    model.save_pretrained(tmp_path / "compact")
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(
        globe.load(tmp_path / "compact")(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"families": ["down", "up"]}, ConfigError, "give one of up; gate; down; up, gate; up, gate, down"),
        ({"families": []}, ConfigError, "families="),
        ({"layers": 9}, GlobeError, "9"),
        ({"kept": 1.5}, ConfigError, r"bank\.kept=1\.5"),
        ({"S_cache": -1}, ConfigError, "S_cache=-1"),
    ],
)
def test_what_is_not_possible_leaves_the_model_alone(
    arguments: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    model = tiny_model("mixtral")
    before = model(TOKENS).logits
    with pytest.raises(kind, match=sentence):
        globe.compress(model, **arguments)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=1e-5)


def test_what_is_no_mixture_of_experts_is_said() -> None:
    with pytest.raises(ConfigError, match="no routed experts"):
        globe.compress(_with_config(torch.nn.Linear(3, 5)))
    with pytest.raises(ConfigError, match="give a transformers model"):
        globe.compress(torch.nn.Linear(3, 5))
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub id"):
        globe.compress("no such folder")
    with pytest.raises(CheckpointError, match="format=dense"):
        globe.compress(tiny_model("gpt_oss"))


def _with_config(module: torch.nn.Module) -> torch.nn.Module:
    module.config = object()  # type: ignore[assignment]
    return module
