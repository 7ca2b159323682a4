"""The tensors of a checkpoint folder, read by name and written in shards.

A checkpoint is one `model.safetensors`, or several files and a `model.safetensors.index.json` that says which
tensor is in which. Index, headers and what transformers loads must be of one mind: a folder in which they differ
would be one model here and another there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from globe.checkpoint.tensorfile import Index, TensorEntry, TensorFile, write_tensorfile
from globe.errors import CheckpointError
from globe.files import read_json, write_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth")
_MOST_TENSORS = 300_000
"""Twice as many as the largest models have; each takes up to 700 bytes of memory."""
_REMEDY = "save or download the checkpoint again"


class ShardReader:
    """All tensors of a folder by name. `bytes_read` counts the bytes of tensors read so far.

    Every header is read and compared with the index when this is made; nothing has to be closed. With `headers`,
    file name -> header as in the file, the files are elsewhere: there are names and sizes, and nothing to read.
    Raises CheckpointError for a folder without safetensors, a missing or damaged file, and wherever transformers
    would load other tensors than the index names.
    """

    def __init__(self, folder: str | Path, headers: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder: give the one that holds config.json")
        index = None
        if headers is None:
            index = self._read_index() if (self.folder / INDEX).exists() else None
            names = [self._only_file()] if index is None else sorted(set(index.values()))
            self._open = self._opened(names)
        else:
            self._open = {name: TensorFile(self.folder / name, one) for name, one in sorted(headers.items())}
        self.index: dict[str, str] = self._join()
        """Tensor name -> file name, as the files have them."""
        if index is not None:
            self._compare(index)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor name."""
        return tuple(self.index)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files, sorted."""
        return tuple(self._open)

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._open.values())

    def __contains__(self, name: object) -> bool:
        return name in self.index

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    def entry(self, name: str) -> TensorEntry:
        """Return dtype, shape and place of a tensor, from its file's header alone."""
        return self.file_of(name).entries[name]

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return the tensor, or `tensor[index]` (integers and slices) with only those rows read; a fresh copy."""
        return self.file_of(name).read(name, index)

    def stored_bytes(self, names: Iterable[str]) -> int:
        """Return the bytes that these tensors take in the files."""
        return sum(self.entry(name).nbytes for name in names)

    def hash(self, names: Iterable[str]) -> str:
        """Return the SHA-256, in hexadecimal, of the stored bytes of the tensors, each name once, in name order."""
        digest = hashlib.sha256()
        for name in sorted(set(names)):
            for piece in self.file_of(name).chunks(name):
                digest.update(piece)
        return digest.hexdigest()

    def file_of(self, name: str) -> TensorFile:
        """Return the file that holds a tensor."""
        if name not in self.index:
            raise CheckpointError(f"{self.folder} has no tensor {name}: is it the checkpoint you mean?")
        return self._open[self.index[name]]

    def file(self, shard: str) -> TensorFile:
        """Return a file by its name."""
        return self._open[shard]

    def _opened(self, names: Iterable[str]) -> dict[str, TensorFile]:
        found, held = dict[str, TensorFile](), 0
        for name in names:
            found[name] = TensorFile(self.folder / name)
            held += len(found[name].entries)
            if held > _MOST_TENSORS:
                raise CheckpointError(
                    f"{self.folder} has more than {_MOST_TENSORS:,} tensors, more than any model: is it one?"
                )
        return found

    def _join(self) -> dict[str, str]:
        """Return tensor name -> file name; of several of one name transformers takes the last, others the first."""
        found: dict[str, str] = {}
        for shard, file in self._open.items():
            for name in file.entries:
                if name in found:
                    raise CheckpointError(
                        f"{name} is in {found[name]} and in {shard} of {self.folder}: remove one of the two"
                    )
                found[name] = shard
        return found

    def _compare(self, index: Mapping[str, str]) -> None:
        path = self.folder / INDEX
        for name, shard in index.items():
            held = self.index.get(name)
            if held is None:
                raise CheckpointError(f"{path} names {name}, which {shard} lacks: {_REMEDY}")
            if held != shard:
                raise CheckpointError(f"{path} names {name} in {shard}, and it is in {held}: {_REMEDY}")
        if omitted := [name for name in self.index if name not in index]:
            raise CheckpointError(
                f"{path} omits {omitted[0]}, which is in {self.index[omitted[0]]}, so that some programs load it and "
                f"others do not: add it to the index, or {_REMEDY}"
            )

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            record = read_json(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a safetensors index ({error}): {_REMEDY}") from error
        index = record.get("weight_map") if isinstance(record, dict) else None
        if (
            not isinstance(index, dict)
            or not index
            or not all(isinstance(one, str) for one in index.values())
        ):
            raise CheckpointError(
                f"{path} is not a safetensors index (it has no weight_map of tensors to files): {_REMEDY}"
            )
        for shard in sorted(set(index.values())):
            if not _is_below(shard):
                raise CheckpointError(f"{path} names the file {shard!r} outside its folder: correct it")
            if not (self.folder / shard).is_file():
                raise CheckpointError(f"{self.folder} lacks {shard}, which its index names: {_REMEDY}")
        if (self.folder / SINGLE).exists() and set(index.values()) != {SINGLE}:
            raise CheckpointError(
                f"{self.folder} holds both {SINGLE}, which transformers loads, and {INDEX}, which names other files: "
                "remove the one that is not the model"
            )
        return index

    def _only_file(self) -> str:
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if SINGLE in found:
            return SINGLE
        if len(found) == 1 and not re.search(r"-\d+-of-\d+\.", found[0]):
            return found[0]
        if found:
            raise CheckpointError(
                f"{self.folder} has {len(found)} safetensors shards but no {INDEX}: {_REMEDY}"
            )
        if any(any(self.folder.glob(pattern)) for pattern in _PICKLED):
            raise CheckpointError(
                f"{self.folder} has only pickled weights, which GloBE never loads: convert them to safetensors first"
            )
        raise CheckpointError(f"{self.folder} holds no safetensors file: give the folder of a checkpoint")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is read when it is indexed: transformers takes it in the place of a tensor."""

    reader: ShardReader
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.reader.read(self.name) if index is Ellipsis else self.reader.read(self.name, index)

    def get_shape(self) -> list[int]:
        return list(self.reader.shape(self.name))


def _is_below(name: str) -> bool:
    """Return whether a file name of an index stays in the folder or in one below it."""
    path = PurePosixPath(name)
    possible = (
        0 < len(name) < 1000
        and "\0" not in name
        and all(len(part.encode("utf-8", "replace")) < 256 for part in path.parts)
    )
    return possible and not path.is_absolute() and ".." not in path.parts


class ShardWriter:
    """Write tensors one by one into `folder`, a new folder that appears as a whole by `globe.files.fresh_folder`.

    Tensors gather in memory until a shard is full (`max_shard_bytes`, in bytes); then it goes to disk. One shard is
    called `model.safetensors`; several get upstream's numbering and an index. `close` writes what is left. Raises
    OSError if the disk refuses.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        if max_shard_bytes < 1:
            raise CheckpointError(f"max_shard_bytes={max_shard_bytes} is not possible: give at least 1")
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)
        self._limit = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._held = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._total = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Add a tensor. It is copied: the caller may reuse it."""
        if name in self._names:
            raise CheckpointError(f"{name} was written twice: give each tensor its own name")
        if self._pending and self._held + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._names.add(name)
        self._held += tensor.nbytes
        self._total += tensor.nbytes

    def close(self) -> None:
        """Write what is left, give the files their names, and write the index."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        index: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / final)
            index |= dict.fromkeys(names, final)
        if count > 1:
            record = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(index.items()))}
            write_text(self.folder / INDEX, json.dumps(record, indent=2) + "\n")

    def _part(self, number: int) -> Path:
        """Return the path of a shard before the number of all is known."""
        return self.folder / f"part-{number:05d}"

    def _flush(self) -> None:
        write_tensorfile(self._part(len(self._shards)), self._pending, {"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._held = {}, 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
