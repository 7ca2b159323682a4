"""A patched folder describes itself: its card, the recipe that repeats the fit, and the look at it after export."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from made_runs import lossless_bank, random_bank, write_run
from safetensors.torch import load_file, save_file

from globe.checkpoint import open_checkpoint
from globe.errors import CheckpointError
from globe.hf.model_card import recipe
from globe.hf.run_banks import open_run
from globe.hf.sanity import look
from globe.patch import parse, patch
from run_support import bytes_of, run_in
from tiny_models import write_tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_tiny("qwen3_moe", tmp_path / "source")
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\ntags: [x]\n---\n# The original\nlicense: none of this\n"
    )
    return folder


def patched(run: Path, out: Path, form: str) -> Path:
    patch(parse([f"run={run}", f"out={out}", f"format={form}"]))
    return out


@pytest.mark.parametrize("form", ["dense", "globe"])
def test_the_card_carries_licence_sizes_and_how_to_load(source: Path, tmp_path: Path, form: str) -> None:
    bank = random_bank(open_checkpoint(str(source)), [(1, "up"), (1, "down")], low_rank=True)
    out = patched(write_run(tmp_path / "run", [bank]), tmp_path / "out", form)
    head, text = (out / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    fields = yaml.safe_load(head)
    assert fields["license"] == "apache-2.0"
    assert fields["base_model_relation"] == "quantized"
    assert "base_model" not in fields  # a folder of this machine is no model of the hub
    assert {"globe", "qwen3_moe"} <= set(fields["tags"])
    assert "| layer001.up+layer001.down | 4 | 13 | 3 |" in text
    assert f"{bank.family_parameters:,} became {bank.kept_parameters:,}" in text
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert "from_pretrained" in text
    assert ("import globe" in text) == (form == "globe")
    assert (out / "README-base-model.md").read_text().endswith("license: none of this\n")


def test_the_recipe_repeats_the_fit_to_the_byte(tmp_path: Path) -> None:
    options = (
        "layer=3",
        "family=down",
        "bank.m=5",
        "bank.r=11",
        "train.steps=2",
        "seed=7",
        "bank.activation=tanh",
    )
    _, first = run_in(tmp_path, *options)
    recipe_folder = tmp_path / "recipe"
    recipe_folder.mkdir()
    (recipe_folder / "recipe.yaml").write_text(recipe(open_run(first)))
    second = tmp_path / "second"
    command = [
        sys.executable,
        "-m",
        "globe.train",
        "--config-dir",
        str(recipe_folder),
        "--config-name",
        "recipe",
    ]
    subprocess.run([*command, f"hydra.run.dir={second}"], cwd=tmp_path, check=True, timeout=300)
    assert bytes_of(first, "layer003.down") == bytes_of(second, "layer003.down")


@pytest.mark.parametrize(
    ("model_type", "form"), [("qwen2_moe", "dense"), ("qwen2_moe", "globe"), ("gpt_oss", "dense")]
)
def test_the_look_after_export(
    tiny: Callable[[str], Path], tmp_path: Path, model_type: str, form: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(model_type)))
    banks = [lossless_bank(checkpoint, (layer, family)) for layer in (0, 1) for family in ("up", "down")]
    run = write_run(tmp_path / "run", banks)
    out = patched(run, tmp_path / "out", form)
    seen = look(out, open_run(run))
    assert seen.experts == (4 if model_type == "qwen2_moe" else 0)
    assert seen.difference < 1e-5
    assert len(seen.tokens) == 10
    assert "generates 10 tokens" in seen.sentence


def test_an_export_that_is_not_what_the_banks_say_is_told(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", [lossless_bank(open_checkpoint(str(tiny("qwen2_moe"))), (1, "gate"))])
    out = patched(run, tmp_path / "out", "dense")
    tensors = load_file(out / "model.safetensors")
    changed = {name: 2 * value if "experts.0.gate_proj" in name else value for name, value in tensors.items()}
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer 1 gate, expert 0 .* patch again"):
        look(out, open_run(run))
    (out / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        look(out, open_run(run))


def test_a_recipe_takes_the_text_as_the_run_did(tmp_path: Path) -> None:
    """Tokens and window were left out, so that a calibrated run was not repeated to the byte."""
    run = write_run(tmp_path / "run", [random_bank(open_checkpoint(None), [(12, "up")])])
    assert "calibrate" not in yaml.safe_load(recipe(open_run(run)))
    (run / "calibration.json").write_text(
        json.dumps({"text": "/home/me/own.txt", "tokens": 2048, "window": 64, "dtype": "float32"})
    )
    text = recipe(open_run(run))
    assert yaml.safe_load(text)["calibrate"] == {"tokens": 2048, "window": 64, "dtype": "float32"}
    assert text.splitlines()[0].endswith(" model.path=ORIGINAL calibrate.text=TEXT")
    assert "/home/me" not in text
