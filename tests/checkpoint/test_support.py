"""What stands beside the weights: all of it goes into a patched folder but other weights and foreign code."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from globe.checkpoint import ShardReader, copy_support_files

TEXTS = (
    "tokenizer.json", "merges.txt", "tokenizer.model", "tiktoken.model", "qwen.tiktoken", "spiece.model", "LICENSE",
    "README.md", "chat_template.jinja", "additional_chat_templates/rag.jinja", "assets/deep/er/logo.svg",
)  # fmt: skip
WEIGHTS = ("pytorch_model.bin", "x.pth", "model.gguf", "pytorch_model.bin.index.json", "model.onnx_data")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder as the hub's cache keeps it: its config is a link to a blob."""
    folder = tmp_path / "source"
    folder.mkdir()
    (tmp_path / "blob").write_text(json.dumps({"model_type": "mixtral"}))
    (folder / "config.json").symlink_to(tmp_path / "blob")
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    for name in (*TEXTS, *WEIGHTS, ".hidden", "original/params.json", "original/consolidated.00.pth"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def copied(source: Path, out: Path) -> tuple[set[str], tuple[str, ...]]:
    """The files in a copy, and the names that are said to be left out."""
    out.mkdir()
    left_out = copy_support_files(ShardReader(source), out)
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}, left_out


def test_all_but_weights_is_copied_and_the_rest_is_named(source: Path, tmp_path: Path) -> None:
    files, left_out = copied(source, tmp_path / "out")
    assert files == {"config.json", *TEXTS}
    assert set(left_out) == {*WEIGHTS, "original/"}
    assert not (tmp_path / "out" / "config.json").is_symlink()
    shutil.rmtree(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "mixtral"}


def test_weights_of_further_tensors_are_copied_and_copies_of_the_model_are_not(
    source: Path, tmp_path: Path
) -> None:
    save_file({"mtp.0.weight": torch.ones(3)}, source / "mtp.safetensors")
    save_file({"x": torch.zeros(2)}, source / "stale.safetensors")
    save_file({"tok_embeddings": torch.zeros(2)}, source / "consolidated.safetensors")
    save_file({"y": torch.zeros(2)}, source / "model-00001-of-00002.safetensors")
    (source / "damaged.safetensors").write_bytes(b"damaged")
    files, left_out = copied(source, tmp_path / "out")
    assert {name for name in files if name.endswith(".safetensors")} == {"mtp.safetensors"}
    wrong = {
        "stale.safetensors",
        "consolidated.safetensors",
        "damaged.safetensors",
        "model-00001-of-00002.safetensors",
    }
    assert wrong <= set(left_out)


def test_code_is_copied_only_where_a_configuration_names_it_and_never_run(
    source: Path, tmp_path: Path
) -> None:
    run = tmp_path / "it was run"
    for name in ("modeling_x", "configuration_x", "tokenization_x", "helper", "setup", "evil"):
        (source / f"{name}.py").write_text(f"open({str(run)!r}, 'w')\n")
    with (source / "modeling_x.py").open("a") as file:
        file.write("from .helper import thing\nfrom .absent import other\nimport evil\n")
    mapped = {"AutoModel": "modeling_x.XModel", "AutoConfig": "configuration_x.X", "AutoOther": "../evil.X"}
    (tmp_path / "blob").write_text(json.dumps({"model_type": "mixtral", "auto_map": mapped}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.Slow", None, 3]}}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    files, left_out = copied(source, tmp_path / "out")
    code = {name for name in files if name.endswith(".py")}
    assert code == {"modeling_x.py", "configuration_x.py", "tokenization_x.py", "helper.py"}
    assert {"setup.py", "evil.py"} <= set(left_out)
    assert not run.exists()


def test_what_is_no_regular_file_is_left_out(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "pipe.json")
    (source / "loop").symlink_to(source, target_is_directory=True)
    (source / "templates").mkdir()
    os.mkfifo(source / "templates" / "pipe.jinja")
    (source / "dangling.json").symlink_to("absent")
    files, left_out = copied(source, tmp_path / "out")
    assert {"pipe.json", "loop/", "templates/", "dangling.json"} <= set(left_out)
    assert files == {"config.json", *TEXTS}
