"""A model that lacks tensors, or has others, is not measured: transformers would draw what is missing at random."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import globe.evaluate as command
from globe.config.commands import start
from globe.patch import parse, patch

SMALL = ("window=16", "stride=8", "batch=4", "max_tokens=60", "against=none")


def run_command(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["globe.evaluate", *arguments])
        try:
            start(command.main)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def rename(folder: Path, part: str, new: str | None) -> str:
    """Rename the first tensor whose name holds `part`, or leave it out; returns what it was called."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        for name in sorted(tensors):
            if part in name:
                tensor = tensors.pop(name)
                if new is not None:
                    tensors[new] = tensor
                save_file(tensors, file, metadata=metadata)
                index = folder / "model.safetensors.index.json"
                if index.is_file():
                    record = json.loads(index.read_text())
                    record["weight_map"].pop(name, None)
                    if new is not None:
                        record["weight_map"][new] = file.name
                    index.write_text(json.dumps(record))
                return name
    raise AssertionError(part)


@pytest.mark.parametrize("form", ["original", "dense", "globe"])
@pytest.mark.parametrize("new", ["model.layers.0.self_attn.renamed.weight", None])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(
    form: str,
    new: str | None,
    checkpoint_of: Callable[..., Path],
    lossy_run: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One renamed q_proj.weight gave a perplexity, and exit code 0."""
    folder = tmp_path / form
    if form == "original":
        shutil.copytree(checkpoint_of(), folder)
    else:
        patch(parse([f"run={lossy_run}", f"out={folder}", f"format={form}"]))
    name = rename(folder, "self_attn.q_proj.weight", new)
    assert run_command(f"model={folder}", f"text={text_file}", *SMALL) == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert name in shown.err
    assert "perplexity" not in shown.out
    assert not (folder / "evaluation.json").exists()


@pytest.mark.parametrize("harm", ["factor", "cut", "config", "routing", "description"])
def test_a_damaged_compact_checkpoint_is_a_sentence(
    harm: str, lossy_run: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "globe"
    patch(parse([f"run={lossy_run}", f"out={folder}", "format=globe"]))
    config = json.loads((folder / "config.json").read_text())
    match harm:
        case "factor":
            rename(folder, "globe_", None)
        case "cut":
            (file, *_) = sorted(folder.glob("*.safetensors"))
            file.write_bytes(file.read_bytes()[:-100])
        case "config":
            (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "many"}))
        case "routing":  # loads, and can't run
            (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": -1}))
        case "description":
            config["quantization_config"]["banks"] = [{"n": "x"}]
            (folder / "config.json").write_text(json.dumps(config))
    assert run_command(f"model={folder}", f"text={text_file}", *SMALL) == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
