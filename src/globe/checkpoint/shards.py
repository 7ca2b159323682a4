"""The tensors of a checkpoint folder, read lazily and written in shards.

A checkpoint is one `model.safetensors`, or several files and a `model.safetensors.index.json` that says which
tensor is in which. A file is opened when one of its tensors is first asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from globe.checkpoint.tensorfile import Index, TensorEntry, TensorFile, write_tensorfile
from globe.errors import CheckpointError
from globe.files import FreshFolder, write_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth")


class ShardReader:
    """All tensors of a folder by name. `bytes_read` counts the bytes of tensors read so far.

    Nothing has to be closed. Raises CheckpointError, here or at the first use of a file, for
    a folder without safetensors, a missing or damaged file, and an index that names a tensor its file lacks.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder: give the one that holds config.json")
        self._open: dict[str, TensorFile] = {}
        self.index: dict[str, str] = {}
        """Tensor name -> file name, as the index (or the only file) has them."""
        if (self.folder / INDEX).is_file():
            self.index = self._read_index()
        else:
            only = self._only_file()
            self._open[only] = TensorFile(self.folder / only)
            self.index = dict.fromkeys(self._open[only].entries, only)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor name."""
        return tuple(self.index)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files, sorted."""
        return tuple(sorted(set(self.index.values())))

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
        """Dtype, shape and place of a tensor, from its file's header alone."""
        return self.file_of(name).entries[name]

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """The tensor, or `tensor[index]` (integers and slices) with only those rows read; a fresh copy."""
        return self.file_of(name).read(name, index)

    def hash(self, names: Iterable[str]) -> str:
        """SHA-256, in hexadecimal, of the stored bytes of the tensors, each name once, in name order."""
        digest = hashlib.sha256()
        for name in sorted(set(names)):
            for piece in self.file_of(name).chunks(name):
                digest.update(piece)
        return digest.hexdigest()

    def file_of(self, name: str) -> TensorFile:
        """The file that holds a tensor."""
        if name not in self.index:
            raise CheckpointError(f"{self.folder} has no tensor {name}: is it the checkpoint you mean?")
        return self.file(self.index[name])

    def file(self, shard: str) -> TensorFile:
        """A file by its name, its header read and checked against the index."""
        if shard not in self._open:
            file = TensorFile(self.folder / shard)
            absent = [n for n, where in self.index.items() if where == shard and n not in file.entries]
            if absent:
                raise CheckpointError(
                    f"{self.folder / INDEX} names {absent[0]}, which {shard} lacks: download both again"
                )
            self._open[shard] = file
        return self._open[shard]

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            index = {str(name): str(names[name]) for name in names}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a safetensors index: download it again") from error
        for shard in sorted(set(index.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{path} names the file {shard!r} outside its folder: correct it")
            if not (self.folder / shard).is_file():
                raise CheckpointError(
                    f"{self.folder} lacks {shard}, which its index names: download it again"
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
                f"{self.folder} has {len(found)} safetensors shards but no {INDEX}: download it again"
            )
        if any(any(self.folder.glob(pattern)) for pattern in _PICKLED):
            raise CheckpointError(
                f"{self.folder} has only pickled weights, which GloBE never loads: convert them to "
                "safetensors first"
            )
        raise CheckpointError(f"{self.folder} holds no safetensors file: give the folder of a checkpoint")


class ShardWriter:
    """Write a checkpoint tensor by tensor; the whole folder appears at `close`, or nothing does.

    Tensors gather in memory until a shard is full (`max_shard_bytes`, in bytes), or until `write` names
    another `shard`; then the shard goes to disk. One unnamed shard is called `model.safetensors`; several get
    upstream's numbering and an index. Use as a context manager: an exception leaves nothing behind.
    """

    def __init__(
        self,
        folder: str | Path,
        max_shard_bytes: int = 5 * 10**9,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if max_shard_bytes < 1:
            raise CheckpointError(f"max_shard_bytes={max_shard_bytes} is not possible: give at least 1")
        self._limit = max_shard_bytes
        self._metadata = {"format": "pt"} if metadata is None else dict(metadata)
        self._fresh = FreshFolder(folder)
        self.folder = self._fresh.path
        """Where the files stand until `close`; other files may be put beside them."""
        self._pending: dict[str, Tensor] = {}
        self._shard: str | None = None
        self._files: dict[str, list[str]] = {}
        self._names: set[str] = set()
        self._total = 0
        self._closed = False

    def write(self, name: str, tensor: Tensor, shard: str | None = None) -> None:
        """Add a tensor, to the file `shard` if given. The tensor is copied: the caller may reuse it."""
        if name in self._names:
            raise CheckpointError(f"{name} was written twice: give each tensor its own name")
        if self._names and (shard is None) != (self._shard is None):
            raise CheckpointError(f"{name}: name the shard of every tensor, or of none")
        if shard is not None and shard in self._files and shard != self._shard:
            raise CheckpointError(
                f"{shard} is on disk already: write the tensors of a shard one after another"
            )
        size = tensor.numel() * tensor.element_size()
        held = sum(one.numel() * one.element_size() for one in self._pending.values())
        if self._pending and (shard != self._shard or (shard is None and held + size > self._limit)):
            self._flush()
        self._shard = shard
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._names.add(name)
        self._total += size

    def _flush(self) -> None:
        # The number of shards is known only at the end, so unnamed ones are renamed then.
        name = self._shard if self._shard is not None else f"part-{len(self._files):05d}"
        write_tensorfile(self.folder / name, self._pending, self._metadata)
        self._files[name] = list(self._pending)
        self._pending = {}

    def close(self) -> None:
        """Write what is left and the index, and make the folder appear."""
        if self._closed:
            return
        self._closed = True
        with self._fresh:
            if self._pending or not self._files:
                self._flush()
            if self._shard is None:
                self._number()
            if list(self._files) != [SINGLE]:
                index = {name: shard for shard, names in self._files.items() for name in names}
                record = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(index.items()))}
                write_text(self.folder / INDEX, json.dumps(record, indent=2) + "\n")

    def abort(self) -> None:
        """Remove what was written."""
        self._closed = True
        self._fresh.discard()

    def _number(self) -> None:
        count = len(self._files)
        renamed: dict[str, list[str]] = {}
        for number, (part, names) in enumerate(self._files.items(), start=1):
            final = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / part).rename(self.folder / final)
            renamed[final] = names
        self._files = renamed

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
