"""A checkpoint copied with some tensors changed: everything else byte for byte, or nothing at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from globe.checkpoint import copy_checkpoint, open_checkpoint
from globe.checkpoint.tensorfile import TensorFile
from globe.errors import CheckpointError
from globe.files import fresh_folder
from tiny_models import EXPERTS, load_tiny


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one", "sharded"])
def test_a_copy_without_changes_is_the_same_bytes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, shard: str
) -> None:
    source = tiny_checkpoint("qwen2_moe", max_shard_size=shard)
    copy_checkpoint(source, tmp_path / "out", {})
    assert files(tmp_path / "out") == files(source)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "granitemoe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("family", ["gate", "up", "down"])
def test_only_the_bytes_of_the_replaced_matrices_change(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, model_type: str, family: str
) -> None:
    """Replace one family of one layer through the table; read it back, and compare all the rest bit by bit."""
    source = tiny_checkpoint(model_type, dtype=torch.bfloat16, max_shard_size="20KB")
    before = open_checkpoint(str(source))
    shape = before.shape(1, family)
    new = torch.randn(shape.n, shape.p, shape.d, generator=torch.Generator().manual_seed(3)).bfloat16()
    places = [before.locate(1, family, expert) for expert in range(EXPERTS)]

    def fill(name: str) -> Callable[[Tensor], Tensor]:
        def change(stored: Tensor) -> Tensor:
            for expert, place in enumerate(places):
                if place.tensor == name:
                    place.view(stored).copy_(new[expert])
            return stored

        return change

    copy_checkpoint(source, tmp_path / "out", {place.tensor: fill(place.tensor) for place in places})
    after = open_checkpoint(str(tmp_path / "out"))
    assert torch.equal(after.read_experts(1, family).weights, new)
    assert after.reader.index == before.reader.index
    touched = {place.tensor for place in places}
    for name in before.reader.names:
        if name not in touched:
            assert torch.equal(after.reader.read(name), before.reader.read(name))
    for other in {"gate", "up", "down"} - {family}:
        assert torch.equal(after.read_experts(1, other).weights, before.read_experts(1, other).weights)
    changed = {name for name, content in files(source).items() if files(tmp_path / "out")[name] != content}
    assert changed == {before.reader.index[name] for name in touched}


def test_metadata_order_and_tied_tensors_stay(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = {name: torch.randn(3, 4) for name in ("z", "a", "m")} | {"b": torch.arange(5)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt", "tied": "lm_head=embed"})
    copy_checkpoint(source, tmp_path / "out", {"m": lambda stored: -stored})
    out = tmp_path / "out" / "model.safetensors"
    with safe_open(source / "model.safetensors", "pt") as one, safe_open(out, "pt") as two:
        assert two.metadata() == one.metadata() == {"format": "pt", "tied": "lm_head=embed"}
        assert two.offset_keys() == one.offset_keys()
    assert TensorFile(out).header == TensorFile(source / "model.safetensors").header
    assert torch.equal(load_file(out)["m"], -tensors["m"])


def test_a_tied_model_loads_and_stays_tied(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen2_moe", tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    copy_checkpoint(source, tmp_path / "out", {name: lambda stored: 2 * stored})
    model = load_tiny(tmp_path / "out", "qwen2_moe")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, 2 * load_file(source / "model.safetensors")[name])


def test_a_function_changes_its_own_copy(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral")
    before = files(source)
    copy_checkpoint(source, tmp_path / "out", {"model.norm.weight": lambda stored: stored.zero_()})
    assert files(source) == before
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].abs().sum() == 0


@pytest.mark.parametrize(
    "wrong", [lambda t: t[:-1], lambda t: t.double(), lambda t: t.T], ids=["shape", "dtype", "transposed"]
)
def test_a_replacement_keeps_shape_and_dtype(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, wrong: Callable[[Tensor], Tensor]
) -> None:
    name = "model.embed_tokens.weight"
    with pytest.raises(CheckpointError, match=rf"{name} is torch.float32 \[37, 24\], but its replacement"):
        copy_checkpoint(tiny_checkpoint("mixtral"), tmp_path / "out", {name: wrong})


@pytest.mark.parametrize("call", ["os.fsync", "shutil.copyfile", "globe.checkpoint.rewrite.raw_bytes"])
def test_a_disk_that_refuses(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    source = tiny_checkpoint("mixtral")
    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        with (
            pytest.raises(OSError, match="No space left on device"),
            fresh_folder(tmp_path / "out") as folder,
        ):
            copy_checkpoint(source, folder, {"model.norm.weight": lambda stored: stored})
    assert list(tmp_path.iterdir()) == []


def test_refusals_before_anything_is_written(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral")
    with pytest.raises(CheckpointError, match="has no tensor absent, so it cannot be replaced"):
        copy_checkpoint(source, tmp_path / "out", {"absent": lambda stored: stored})
    with pytest.raises(shutil.SameFileError):
        copy_checkpoint(source, source, {})
