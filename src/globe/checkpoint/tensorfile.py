"""One safetensors file, read and written by explicit byte ranges.

The format is eight bytes of length, a JSON header of that length, and the tensors' bytes without a gap. The
safetensors library hands out views of a memory map: the pages stay counted as this process's memory, so it
grows with every layer read, two reads of a tensor share storage, and a file cut short while it is open kills
the process. Ranges read with `readinto` do none of this, and they count honestly what was read. That both
directions agree with the library is tested.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globe.errors import CheckpointError
from globe.files import unwritable

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
# float8_e8m0fnu is younger than the oldest torch supported.
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

Index = int | slice | tuple[int | slice, ...]
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 100_000_000  # the library's own limit
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: its dtype and shape, and its bytes [start, stop) in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class TensorFile:
    """A safetensors file, its header checked when this is made. `bytes_read` counts tensor bytes read.

    The file is opened for each read and closed after it, so there is nothing to close. Raises CheckpointError
    if it is missing, truncated, not safetensors, or holds a dtype torch lacks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        with self._opened() as file:
            self.header, self.entries, self.metadata = self._parse(file)

    def _opened(self) -> FileIO:
        try:
            return FileIO(self.path)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be opened ({error.strerror}): make it readable or download it again"
            ) from error

    def _parse(self, file: FileIO) -> tuple[bytes, dict[str, TensorEntry], dict[str, str]]:
        """Raw header with its length, the entries in the order of their bytes, and the metadata."""
        size = os.fstat(file.fileno()).st_size
        first = file.read(_LENGTH.size)
        length = _LENGTH.unpack(first)[0] if len(first) == _LENGTH.size else 0
        text = file.read(length) if 2 <= length <= min(_LONGEST_HEADER, size) else b""
        if not text or len(text) < length:
            raise self._broken("its header is cut off or was never one of safetensors")
        try:
            record = json.loads(text)
            metadata = dict(record.pop("__metadata__", None) or {})
            order = sorted(record.items(), key=lambda item: item[1]["data_offsets"])
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise self._broken("its header is not that of a safetensors file") from error
        entries: dict[str, TensorEntry] = {}
        begin = position = _LENGTH.size + length
        for name, one in order:
            entries[name] = entry = self._entry(name, one, begin)
            if entry.start != position:
                raise self._broken(f"the bytes of {name} do not follow those of the tensor before it")
            position = entry.stop
        if position != size:
            raise self._broken(f"it has {size} bytes where its header promises {position}")
        return first + text, entries, metadata

    def _entry(self, name: str, one: Any, begin: int) -> TensorEntry:
        try:
            code, shape = one["dtype"], tuple(int(extent) for extent in one["shape"])
            start, stop = (begin + int(offset) for offset in one["data_offsets"])
        except (TypeError, KeyError, ValueError) as error:
            raise self._broken(f"its entry for {name} is malformed") from error
        if code not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {code}, which GloBE does not read: convert it"
            )
        dtype = DTYPES[code]
        if min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
            raise self._broken(f"{name} has {stop - start} bytes, not those of {code} {list(shape)}")
        return TensorEntry(dtype, shape, start, stop)

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated or damaged ({why}): download it again")

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """A fresh contiguous tensor equal to `whole[index]`; reads no row that the index leaves out.

        Integers and slices with positive steps, as in torch. Axes are read in runs as long as the index
        allows; only where a slice has a step above 1 are the elements between read too.
        """
        entry = self.entries[name]
        spans, drop = _spans(index, entry.shape)
        # Axes from `axis` on make one contiguous run for every combination of the axes before it.
        axis = len(spans)
        while axis > 0 and all(s == range(n) for s, n in zip(spans[axis:], entry.shape[axis:], strict=True)):
            axis -= 1
        inner = math.prod(entry.shape[axis + 1 :])
        span = spans[axis] if spans else range(1)
        extent = span[-1] + 1 - span[0] if len(span) else 0
        outer = spans[:axis]
        whole = torch.empty([*map(len, outer), extent, inner], dtype=entry.dtype)
        if whole.numel():
            raw = raw_bytes(whole)
            run = extent * inner * entry.dtype.itemsize
            strides = [math.prod(entry.shape[k + 1 :]) for k in range(len(spans))]
            with self._opened() as file:
                for number, position in enumerate(itertools.product(*outer)):
                    first = sum(p * s for p, s in zip(position, strides, strict=False)) + span[0] * inner
                    target = raw[number * run : (number + 1) * run]
                    self._fill(file, entry.start + first * entry.dtype.itemsize, target)
        picked = whole[..., :: span.step, :] if span.step > 1 else whole
        shape = [len(s) for s, dropped in zip(spans, drop, strict=True) if not dropped]
        return picked.contiguous().view(shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor as stored, piece by piece, in one buffer that the next piece overwrites."""
        entry = self.entries[name]
        buffer = memoryview(bytearray(min(_CHUNK, entry.nbytes)))
        with self._opened() as file:
            for start in range(entry.start, entry.stop, _CHUNK):
                piece = buffer[: min(_CHUNK, entry.stop - start)]
                self._fill(file, start, piece)
                yield piece

    def _fill(self, file: FileIO, start: int, target: memoryview) -> None:
        file.seek(start)
        done = 0
        while done < len(target):  # one call reads 2 GiB at most
            count = file.readinto(target[done:])
            if not count:
                raise self._broken("it ended while it was read")
            done += count
        self.bytes_read += done


def _spans(index: Index | None, shape: tuple[int, ...]) -> tuple[list[range], list[bool]]:
    """The positions taken on every axis, and whether an integer drops the axis. Raises IndexError."""
    given = () if index is None else index if isinstance(index, tuple) else (index,)
    if len(given) > len(shape):
        raise IndexError(f"{len(given)} indices for a tensor of {len(shape)} axes")
    spans, drop = [], []
    for axis, extent in enumerate(shape):
        one = given[axis] if axis < len(given) else slice(None)
        if isinstance(one, int):
            if not -extent <= one < extent:
                raise IndexError(f"index {one} on an axis of {extent}")
            one = one % extent
            spans.append(range(one, one + 1))
        else:
            spans.append(range(*one.indices(extent)))
            if spans[-1].step < 1:
                raise IndexError("a slice needs a positive step")
        drop.append(isinstance(given[axis], int) if axis < len(given) else False)
    return spans, drop


def write_tensorfile(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write and sync one safetensors file. Equal tensors, order and metadata give equal bytes.

    Wider dtypes come first and the given order is kept among equals, so that every tensor lies aligned. The
    file gets the user's default mode (the library's `save_file` leaves it readable by its owner alone).
    """
    order = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    record: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in order:
        stop = position + tensor.numel() * tensor.element_size()
        record[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(_LENGTH.pack(len(text)) + text)
            for _, tensor in order:
                file.write(raw_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; no copy if it is contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data
