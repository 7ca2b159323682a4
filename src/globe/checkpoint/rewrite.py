"""A checkpoint copied with some of its tensors replaced, everything else byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from globe.checkpoint.shards import INDEX, ShardReader
from globe.checkpoint.support import copy_file, copy_support_files
from globe.checkpoint.tensorfile import TensorFile, raw_bytes
from globe.errors import CheckpointError


def copy_checkpoint(
    source: str | Path, folder: Path, replace: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[str, ...]:
    """Copy the checkpoint folder `source` into `folder`, the tensors named in `replace` changed by its functions.

    A function gets the stored tensor (its own copy) and returns one of the same shape and dtype. File names, headers,
    metadata, the order of tensors, the index and every other tensor stay byte for byte, so tied tensors stay tied. What
    is beside them is copied too, see `copy_support_files`, and the names of what is not copied are returned. At most
    one tensor is in memory. `folder` is a new one, and appears as a whole by `globe.files.fresh_folder`. Raises
    CheckpointError if a name is not in the checkpoint, or a function returns another shape or dtype, and OSError if
    the disk refuses.
    """
    reader = ShardReader(source)
    if absent := sorted(set(replace) - set(reader.names)):
        raise CheckpointError(
            f"{source} has no tensor {absent[0]}, so it cannot be replaced: check the names"
        )
    folder.mkdir(exist_ok=True)
    left_out = copy_support_files(reader, folder)
    if (reader.folder / INDEX).is_file():
        copy_file(reader.folder / INDEX, folder / INDEX)
    for shard in reader.files:
        (folder / shard).parent.mkdir(parents=True, exist_ok=True)
        _copy_shard(reader.file(shard), folder / shard, replace)
    return left_out


def _copy_shard(file: TensorFile, target: Path, replace: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    with target.open("xb") as copy:
        copy.write(file.header)
        for name in file.entries:  # in the order of their bytes, which leave no gap
            if name in replace:
                copy.write(raw_bytes(_replaced(file, name, replace[name])))
            else:
                for piece in file.chunks(name):
                    copy.write(piece)
        copy.flush()
        os.fsync(copy.fileno())


def _replaced(file: TensorFile, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
    entry = file.entries[name]
    new = function(file.read(name))
    if (tuple(new.shape), new.dtype) != (entry.shape, entry.dtype):
        raise CheckpointError(
            f"{name} is {entry.dtype} {list(entry.shape)}, but its replacement {new.dtype} "
            f"{list(new.shape)}: keep shape and dtype"
        )
    return new
