"""One safetensors file: agreement with the library in both directions, exact ranges, and damaged files."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from globe.checkpoint.tensorfile import CODES, TensorFile, write_tensorfile
from globe.errors import CheckpointError

SHAPE = (3, 5, 7)


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cube") / "cube.safetensors"
    tensors = {
        "before": torch.arange(11, dtype=torch.int64),
        "cube": torch.arange(3 * 5 * 7, dtype=torch.float32).view(SHAPE),
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "number": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
    }
    save_file(tensors, path, metadata={"format": "pt", "other": "two"})
    return path


def an_index(extent: int) -> st.SearchStrategy[Any]:
    ends = st.none() | st.integers(-extent - 1, extent + 1)
    slices = st.builds(slice, ends, ends, st.none() | st.integers(1, 3))
    return slices | st.integers(-extent, extent - 1)


@given(index=st.integers(0, 3).flatmap(lambda k: st.tuples(*map(an_index, SHAPE[:k]))))
def test_any_index_gives_what_torch_gives(cube: Path, index: tuple[Any, ...]) -> None:
    file = TensorFile(cube)
    whole = load_file(cube)["cube"]
    part = file.read("cube", index)
    assert part.is_contiguous()
    assert torch.equal(part, whole[index])
    strides = whole[index].stride()
    if (
        not strides or strides[-1] == 1 or part.shape[-1] < 2
    ):  # nothing lies between two numbers of the last axis
        assert file.bytes_read == part.numel() * 4
    assert file.bytes_read <= whole.numel() * 4


def test_whole_tensors_equal_the_library(cube: Path) -> None:
    file = TensorFile(cube)
    for name, tensor in load_file(cube).items():
        mine = file.read(name)
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(mine, tensor)
    assert file.metadata == {"format": "pt", "other": "two"}
    assert torch.equal(file.read("cube", 2), file.read("cube")[2])


def test_what_is_read_is_ours_alone(cube: Path) -> None:
    """The library's tensors are views of one memory map: changing one changes what the next read returns."""
    file = TensorFile(cube)
    first = file.read("cube", 1)
    first.zero_()
    assert file.read("cube", 1).sum() > 0
    assert first.untyped_storage().nbytes() == 5 * 7 * 4


@pytest.mark.parametrize(
    "index", [3, (0, 5), (slice(None), slice(None), -8), (0, 0, 0, 0), slice(None, None, -1)]
)
def test_an_index_out_of_range(cube: Path, index: Any) -> None:
    with pytest.raises((IndexError, ValueError)):
        TensorFile(cube).read("cube", index)


def test_chunks_are_the_stored_bytes(cube: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("globe.checkpoint.tensorfile._CHUNK", 32)
    file = TensorFile(cube)
    joined = b"".join(bytes(piece) for piece in file.chunks("cube"))
    assert joined == load_file(cube)["cube"].numpy().tobytes()
    assert list(file.chunks("nothing")) == []
    assert file.bytes_read == len(joined) == 420


@pytest.mark.parametrize("dtype", list(CODES), ids=str)
def test_every_dtype_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    size = dtype.itemsize
    bits = torch.arange(6 * size, dtype=torch.uint8) % (2 if dtype is torch.bool else 100)
    tensors = {"a": bits.view(dtype).view(2, 3), "b": torch.arange(5, dtype=torch.int16)}
    path = tmp_path / "x.safetensors"
    write_tensorfile(path, tensors, {"format": "pt"})
    library = load_file(path)
    mine = TensorFile(path)
    for name, tensor in tensors.items():
        for other in (library[name], mine.read(name)):
            assert other.dtype is tensor.dtype
            assert torch.equal(other.view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_writer_is_read_by_the_library_whatever_the_order(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "z": torch.randn(4, 5).T,
        "ä name": torch.randn(3, dtype=torch.float64),
        "a": torch.zeros(0, 2),
        "scalar": torch.tensor(7, dtype=torch.int32),
    }
    path = tmp_path / "x.safetensors"
    write_tensorfile(path, tensors, {})
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name])
    with safe_open(path, "pt") as file:
        assert file.metadata() is None
        assert list(file.offset_keys()) == ["ä name", "z", "a", "scalar", "odd"]


def test_equal_tensors_give_equal_bytes_and_the_default_mode(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(5)}
    for name in ("one", "two"):
        write_tensorfile(tmp_path / name, tensors, {"format": "pt", "b": "c", "a": "d"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("one", "plain")}
    assert len(modes) == 1


def encoded(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


DAMAGED = {
    "deep": encoded(b'{"a":' * 10**5),
    "infinite": encoded(b'{"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', b"8" * 8),
    "a tensor twice": encoded(
        json.dumps(one())[:-1].encode() + b", " + json.dumps(one())[1:].encode(), b"8" * 8
    ),
    "a list for a dtype": encoded(one(dtype=["F32"]), b"8" * 8),
    "a shape of floats": encoded(one(shape=[2.0]), b"8" * 8),
    "a shape of truth": encoded(one(shape=[True, 2]), b"8" * 8),
    "an extent that no stride reaches": encoded(one(shape=[2**62, 4, 0], data_offsets=[0, 0])),
    "sixty axes": encoded(one(shape=[1] * 60 + [2]), b"8" * 8),
    "negative offsets": encoded(one(data_offsets=[-8, 0])),
    "a million empty tensors": encoded(
        b"{"
        + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % k for k in range(10**6))
        + b"}"
    ),
    "a name that is no text": encoded(
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"8" * 8
    ),
    "metadata that is no text": encoded(one() | {"__metadata__": {"format": 3}}, b"8" * 8),
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "longer than the file": struct.pack("<Q", 1000) + b"{}",
    "absurdly long": struct.pack("<Q", 2**60) + b"{}",
    "not JSON": encoded(b"{nothing"),
    "not UTF-8": encoded(b"{\xff\xfe}"),
    "a list": encoded([1, 2]),
    "a tensor that is no object": encoded({"x": 3}),
    "no offsets": encoded({"x": {"dtype": "F32", "shape": [2]}}, b"8" * 8),
    "three offsets": encoded(one(data_offsets=[0, 4, 8]), b"8" * 8),
    "text for a shape": encoded(one(shape="two"), b"8" * 8),
    "a negative extent": encoded(one(shape=[-2]), b"8" * 8),
    "other size than shape": encoded(one(shape=[3]), b"8" * 8),
    "a gap": encoded(one(data_offsets=[4, 12]), b"8" * 12),
    "cut": encoded(one(), b"8" * 7),
    "too long": encoded(one(), b"8" * 9),
    "overlap": encoded(one() | {"y": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, b"8" * 8),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is truncated or damaged .*: save or download it again$"
    ):
        TensorFile(path)


def test_a_dtype_of_parts_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(encoded(one(dtype="F4", shape=[16]), b"8" * 8))
    with pytest.raises(CheckpointError, match="x has dtype F4, which GloBE does not read"):
        TensorFile(path)


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    file = TensorFile(path)
    os.truncate(path, os.stat(path).st_size - 100)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        file.read("x")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        file.read("x")


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_tensorfile(tmp_path / "absent" / "x.safetensors", {"x": torch.ones(2)}, {})
