"""Folders of shards: what the reader finds, and what the writer leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from globe.checkpoint import ShardReader, ShardWriter
from globe.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{k}.weight": torch.randn(k + 2, 7, generator=generator) for k in range(6)}


def test_reader_over_the_shards_transformers_writes(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("qwen2_moe", max_shard_size="20KB")
    reader = ShardReader(folder)
    expected = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    assert sorted(reader.names) == sorted(expected)
    assert len(reader.files) == len(list(folder.glob("*.safetensors"))) > 2
    assert reader.bytes_read == 0
    for name, tensor in expected.items():
        assert name in reader
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(reader.read(name), tensor)
    assert reader.bytes_read == sum(tensor.numel() * 4 for tensor in expected.values())
    with pytest.raises(CheckpointError, match="has no tensor absent"):
        reader.read("absent")


def test_one_file_of_any_name(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "weights.safetensors")
    assert ShardReader(tmp_path).names == ("x",)
    save_file({"y": torch.ones(3)}, tmp_path / "model.safetensors")
    assert ShardReader(tmp_path).names == ("y",)


def test_writer_of_one_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    with ShardWriter(tmp_path / "out") as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        (writer.folder / "config.json").write_text("{}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name])


def test_writer_of_several_files_as_upstream_names_them(tmp_path: Path) -> None:
    tensors = some_tensors()
    with ShardWriter(tmp_path / "out", max_shard_bytes=7 * 4 * 7) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    # Rows 2, 3, 4, ... of 28 bytes, at most 7 rows a file.
    assert ShardReader(tmp_path / "out").index == {
        "layer.0.weight": "model-00001-of-00005.safetensors",
        "layer.1.weight": "model-00001-of-00005.safetensors",
        "layer.2.weight": "model-00002-of-00005.safetensors",
        "layer.3.weight": "model-00003-of-00005.safetensors",
        "layer.4.weight": "model-00004-of-00005.safetensors",
        "layer.5.weight": "model-00005-of-00005.safetensors",
    }
    record = json.loads((tmp_path / "out" / INDEX).read_text())
    assert record["metadata"]["total_size"] == 28 * (2 + 3 + 4 + 5 + 6 + 7)
    assert all(torch.equal(ShardReader(tmp_path / "out").read(n), t) for n, t in tensors.items())


def test_the_caller_may_reuse_a_tensor_it_has_written(tmp_path: Path) -> None:
    buffer = torch.zeros(3, 4)
    with ShardWriter(tmp_path / "out") as writer:
        for k in range(3):
            writer.write(str(k), buffer.fill_(k).T)
    for k in range(3):
        assert torch.equal(ShardReader(tmp_path / "out").read(str(k)), torch.full((4, 3), float(k)))


def test_what_the_writer_refuses(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out") as writer:
        writer.write("x", torch.ones(2))
        with pytest.raises(CheckpointError, match="x was written twice"):
            writer.write("x", torch.ones(2))
    with pytest.raises(CheckpointError, match="max_shard_bytes=0"):
        ShardWriter(tmp_path / "new", max_shard_bytes=0)


def index_of(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        ShardReader(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        ShardReader(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="pickled weights, which GloBE never loads"):
        ShardReader(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"1 safetensors shards but no model\.safetensors\.index\.json"):
        ShardReader(tmp_path)


def test_indices_that_lie(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    index_of(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks b\.safetensors, which its index names"):
        ShardReader(tmp_path)
    index_of(tmp_path, {"x": "a.safetensors", "y": "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"names y, which a\.safetensors lacks"):
        ShardReader(tmp_path)
    for outside in ("../a.safetensors", "/a.safetensors", "", "b/../../a.safetensors", "a\0.safetensors"):
        index_of(tmp_path, {"x": outside})
        with pytest.raises(CheckpointError, match="outside its folder"):
            ShardReader(tmp_path)
    for content in (
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": ["x"]}',
        '{"weight_map": {"x": 1}}',
        "[" * 10**5,
    ):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(CheckpointError, match="is not a safetensors index"):
            ShardReader(tmp_path)


def test_two_authorities_that_differ_are_refused_with_both_names(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(2), "y": torch.ones(3)}, tmp_path / "b.safetensors")
    index_of(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"x is in a\.safetensors and in b\.safetensors of"):
        ShardReader(tmp_path)
    save_file({"z": torch.zeros(2), "y": torch.ones(3)}, tmp_path / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"index\.json omits z, which is in b\.safetensors, so that some"
    ):
        ShardReader(tmp_path)
    index_of(tmp_path, {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"names z in a\.safetensors, and it is in b\.safetensors"):
        ShardReader(tmp_path)
    index_of(tmp_path, {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"})
    assert ShardReader(tmp_path).names == ("x", "y", "z")
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"both model\.safetensors, which transformers loads, and model\.safe"
    ):
        ShardReader(tmp_path)
    index_of(tmp_path, {"x": "model.safetensors"})  # an index may name the one file
    assert ShardReader(tmp_path).files == ("model.safetensors",)


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("globe.checkpoint.shards._MOST_TENSORS", 3)
    for number in range(2):
        save_file({f"{number}.{k}": torch.ones(2) for k in range(2)}, tmp_path / f"{number}.safetensors")
    index_of(tmp_path, {f"{number}.{k}": f"{number}.safetensors" for number in range(2) for k in range(2)})
    with pytest.raises(CheckpointError, match="more than 3 tensors, more than any model"):
        ShardReader(tmp_path)


def test_shards_in_a_folder_below_are_read(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    save_file({"x": torch.arange(3)}, tmp_path / "below" / "a.safetensors")
    index_of(tmp_path, {"x": "below/a.safetensors"})
    assert torch.equal(ShardReader(tmp_path).read("x"), torch.arange(3))
