"""A checkpoint copied with some of its tensors replaced: everything else byte for byte, or dequantised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from globe.checkpoint.quantised.reader import DequantisedReader
from globe.checkpoint.shards import INDEX, ShardReader, ShardWriter
from globe.checkpoint.support import copy_file, copy_support_files
from globe.checkpoint.tensorfile import TensorFile, raw_bytes
from globe.config.console import progress_bar
from globe.errors import CheckpointError
from globe.files import read_json, write_text

_OF_QUANTISATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml")
"""Files in which GPTQ, AWQ, ModelOpt and llm-compressor say how a checkpoint was quantised."""


def copy_checkpoint(
    source: str | Path, folder: Path, replace: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[str, ...]:
    """Copy the checkpoint folder `source` into `folder`, the tensors named in `replace` changed by its functions.

    A function gets the stored tensor (its own copy) and returns one of the same shape and dtype. File names, headers,
    metadata, the order of tensors, the index (if it has metadata) and every other tensor stay byte for byte, so tied
    tensors stay tied. What is beside them is copied too, see `copy_support_files`, and the names of what is not copied
    are returned. At most one tensor is in memory. `folder` is a new one, and appears as a whole by
    `globe.files.fresh_folder`. Raises
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
        _copy_index(reader.folder / INDEX, folder / INDEX)
    with progress_bar(len(reader.names), "tensor", "writing") as bar:
        for shard in reader.files:
            (folder / shard).parent.mkdir(parents=True, exist_ok=True)
            for _ in _copy_shard(reader.file(shard), folder / shard, replace):
                bar.update()
    return left_out


def _copy_index(source: Path, target: Path) -> None:
    """Copy an index, with metadata where it has none: transformers loads no other."""
    record = read_json(source)
    if isinstance(record.get("metadata"), dict):
        copy_file(source, target)
    else:
        write_text(target, json.dumps(record | {"metadata": {}}, indent=2) + "\n")


def copy_dequantised(
    reader: DequantisedReader,
    config: Mapping[str, Any],
    folder: Path,
    replace: Mapping[str, Callable[[Tensor], Tensor]],
) -> tuple[str, ...]:
    """Write the plain checkpoint that a quantised one stands for, tensors changed as in `copy_checkpoint`.

    All matrices are dequantised and nothing is left of the quantisation: `config` is the plain one, and files that
    tell of it stay behind. Returns the names of what is not copied. A shard is in memory at a time, and at least one
    tensor.
    """
    left_out = copy_plain_support(reader, config, folder)
    with ShardWriter(folder) as writer, progress_bar(len(reader.names), "tensor", "writing") as bar:
        for name in reader.names:
            writer.write(name, _changed(reader.read(name), name, replace))
            bar.update()
    return left_out


def copy_plain_support(reader: ShardReader, config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Copy what is beside the weights without what tells of a quantisation; `config` becomes `config.json`."""
    left_out = copy_support_files(reader, folder)
    if isinstance(reader, DequantisedReader):
        told = [name for name in _OF_QUANTISATION if (folder / name).is_file()]
        for name in told:
            (folder / name).unlink()
        left_out = tuple(sorted((*left_out, *told)))
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return left_out


def _copy_shard(
    file: TensorFile, target: Path, replace: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[str]:
    """Write the copy, and yield the name of each tensor once it is written."""
    with target.open("xb") as copy:
        copy.write(file.header)
        for name in file.entries:  # in the order of their bytes, which leave no gap
            if name in replace:
                copy.write(raw_bytes(_changed(file.read(name), name, replace)))
            else:
                for piece in file.chunks(name):
                    copy.write(piece)
            yield name
        copy.flush()
        os.fsync(copy.fileno())


def _changed(stored: Tensor, name: str, replace: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
    if name not in replace:
        return stored
    shape, dtype = stored.shape, stored.dtype
    new = replace[name](stored)
    if (new.shape, new.dtype) != (shape, dtype):
        raise CheckpointError(
            f"{name} is {dtype} {list(shape)}, but its replacement {new.dtype} {list(new.shape)}: keep shape and dtype"
        )
    return new
