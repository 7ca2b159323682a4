"""Folders of shards: what the reader finds, and what the writer leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
            assert not (tmp_path / "out").exists()
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


def test_writer_under_given_file_names(tmp_path: Path) -> None:
    tensors = some_tensors()
    shards = dict(zip(tensors, ["b", "b", "a", "a", "a", "c"], strict=True))
    with ShardWriter(tmp_path / "out", max_shard_bytes=1) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor, f"{shards[name]}.safetensors")
        with pytest.raises(CheckpointError, match=r"a\.safetensors is on disk already"):
            writer.write("late", torch.ones(2), "a.safetensors")
        with pytest.raises(CheckpointError, match="of every tensor, or of none"):
            writer.write("late", torch.ones(2))
        with pytest.raises(CheckpointError, match="written twice"):
            writer.write("layer.0.weight", torch.ones(2), "c.safetensors")
    assert ShardReader(tmp_path / "out").index == {n: f"{shards[n]}.safetensors" for n in sorted(shards)}
    assert torch.equal(ShardReader(tmp_path / "out").read("layer.3.weight"), tensors["layer.3.weight"])


def test_the_caller_may_reuse_a_tensor_it_has_written(tmp_path: Path) -> None:
    buffer = torch.zeros(3, 4)
    with ShardWriter(tmp_path / "out") as writer:
        for k in range(3):
            writer.write(str(k), buffer.fill_(k).T)
    for k in range(3):
        assert torch.equal(ShardReader(tmp_path / "out").read(str(k)), torch.full((4, 3), float(k)))


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out", max_shard_bytes=1)

    def fail_midway() -> None:
        with writer:
            writer.write("x", torch.ones(2))
            writer.write("y", torch.ones(2))
            assert any(writer.folder.iterdir())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_midway()
    assert list(tmp_path.iterdir()) == []
    assert not writer.folder.exists()


def test_what_stands_there_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with ShardWriter(out) as writer:  # an empty folder is free
        writer.write("x", torch.ones(2))
    with pytest.raises(CheckpointError, match="exists already: remove it or give another folder"):
        ShardWriter(out)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        ShardWriter(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        ShardWriter(tmp_path / "file" / "below")
    with pytest.raises(CheckpointError, match="max_shard_bytes=0"):
        ShardWriter(tmp_path / "new", max_shard_bytes=0)


def test_a_folder_taken_while_writing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "out")
    writer.write("x", torch.ones(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_remains_of_a_killed_process_are_no_obstacle(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path / "out", max_shard_bytes=1)
    first.write("x", torch.ones(2))
    first.write("y", torch.ones(2))
    with ShardWriter(tmp_path / "out") as second:  # the same process number
        second.write("z", torch.ones(3))
    assert ShardReader(tmp_path / "out").names == ("z",)


def refuse(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["os.replace", "os.fsync"])
def test_a_disk_that_refuses_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    writer = ShardWriter(tmp_path / "out")
    writer.write("x", torch.ones(2))
    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
            writer.close()
    assert list(tmp_path.iterdir()) == []
    writer.close()  # closed already: nothing more happens
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_in_the_index_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path / "out", max_shard_bytes=1)
    writer.write("x", torch.ones(2))
    writer.write("y", torch.ones(2))
    opened = Path.open

    def refuse_text(path: Path, mode: str = "r", **options: Any) -> Any:
        return refuse() if mode == "w" else opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", refuse_text)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


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
        ShardReader(tmp_path).read("x")
    index_of(tmp_path, {"x": "../a.safetensors"})
    with pytest.raises(CheckpointError, match="outside its folder"):
        ShardReader(tmp_path)
    for content in ("{", "[]", "{}", '{"weight_map": 3}'):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(CheckpointError, match="is not a safetensors index"):
            ShardReader(tmp_path)
