"""One safetensors file, read and written by explicit byte ranges.

The format is eight bytes of length, a JSON header of that length, and the tensors' bytes without a gap. The
safetensors library maps the file into memory: two reads of a tensor share storage, a file cut short while it is
open kills the process, and each opening parses the header again. Ranges read with `readinto` do none of this, and
they count what was read. That both directions agree with the library is tested.
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
from globe.files import open_regular, parse_json

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
_LONGEST_HEADER = 32 << 20
"""Bytes; a header of 200,000 tensors, as many as `globe.files` reads, is smaller."""
_CHUNK = 1 << 24
_MOST_AXES = 32
_REMEDY = "save or download it again"


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

    The file is opened for each read and closed after it, so there is nothing to close. With `record`, the header
    of a file elsewhere, there are entries and nothing to read. Raises CheckpointError if the file is missing,
    truncated, not safetensors, or holds a dtype torch lacks.
    """

    def __init__(self, path: Path, record: dict[str, Any] | None = None) -> None:
        self.path = path
        self.bytes_read = 0
        self.header = b""
        """Raw header with its length."""
        if record is None:
            with self._opened() as file:
                self.header, size = self._read_header(file), os.fstat(file.fileno()).st_size
            try:
                record = parse_json(self.header[_LENGTH.size :])
            except ValueError as error:
                raise self._broken(f"its header can't be read, {error}") from error
        else:
            size = None
        if not isinstance(record, dict):
            raise self._broken("its header is not that of a safetensors file")
        self.metadata = self._metadata(record.pop("__metadata__", None))
        self.entries = self._entries(record, size)
        """Name -> entry, in the order of their bytes."""

    def _opened(self) -> FileIO:
        try:
            return open_regular(self.path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self.path} cannot be opened ({reason}): {_REMEDY}") from error

    def _read_header(self, file: FileIO) -> bytes:
        first = file.read(_LENGTH.size) or b""
        if first.startswith(b"version "):
            raise CheckpointError(
                f"{self.path} is a pointer of git-lfs and not the file itself: fetch it with `git lfs pull`"
            )
        length = _LENGTH.unpack(first)[0] if len(first) == _LENGTH.size else 0
        if length > _LONGEST_HEADER and length <= os.fstat(file.fileno()).st_size:
            raise self._broken(f"its header has {length:,} bytes, and at most {_LONGEST_HEADER:,} are read")
        text = (file.read(length) or b"") if 2 <= length <= _LONGEST_HEADER else b""
        if not text or len(text) < length:
            raise self._broken("its header is cut off or was never one of safetensors")
        return first + text

    def _metadata(self, record: Any) -> dict[str, str]:
        found = {} if record is None else record
        if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
            raise self._broken("its metadata is not text under names")
        return found

    def _entries(self, record: dict[str, Any], size: int | None) -> dict[str, TensorEntry]:
        """Return every tensor in the order of its bytes, which must follow each other, up to a known `size`."""
        try:
            "".join(record).encode()
        except UnicodeEncodeError as error:  # half of a pair of JSON's escapes, which the library refuses too
            raise self._broken("a name in it is no text") from error
        begin = position = len(self.header)
        found = {name: self._entry(name, one, begin) for name, one in record.items()}
        entries = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
        for name, entry in entries.items():
            if entry.start != position:
                raise self._broken(f"the bytes of {name} do not follow those of the tensor before it")
            position = entry.stop
        if size is not None and position != size:
            raise self._broken(f"it has {size} bytes where its header promises {position}")
        return entries

    def _entry(self, name: str, one: Any, begin: int) -> TensorEntry:
        if not isinstance(one, dict):
            raise self._broken(f"its entry for {name} is malformed")
        code, shape, offsets = (
            one.get("dtype"),
            _integers(one.get("shape")),
            _integers(one.get("data_offsets")),
        )
        if (
            not isinstance(code, str)
            or shape is None
            or len(shape) > _MOST_AXES
            or offsets is None
            or len(offsets) != 2
        ):
            raise self._broken(f"its entry for {name} is malformed")
        if code not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {code}, which GloBE does not read: convert it"
            )
        dtype, (start, stop) = DTYPES[code], offsets
        # an extent of zero hides the others from the size in bytes, but not from the strides that torch computes
        if (
            min(shape, default=0) < 0
            or math.prod(max(extent, 1) for extent in shape) * dtype.itemsize >= 1 << 63
        ):
            raise self._broken(f"{name} has the impossible shape {shape}")
        if stop - start != math.prod(shape) * dtype.itemsize or start < 0:
            raise self._broken(f"{name} has {stop - start} bytes, not those of {code} {shape}")
        return TensorEntry(dtype, tuple(shape), begin + start, begin + stop)

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated or damaged ({why}): {_REMEDY}")

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return a fresh contiguous tensor equal to `whole[index]`; reads no byte that the index leaves out.

        Integers and slices with positive steps, as in torch. Only where the last axis of the result has a step above
        1, the elements between are read too. Raises IndexError or ValueError for an index that torch refuses.
        """
        entry = self.entries[name]
        # a view without memory tells where in the file the elements of the result are
        view = torch.empty(entry.shape, dtype=entry.dtype, device="meta")[() if index is None else index]
        if not view.numel():
            return torch.empty(view.shape, dtype=entry.dtype)
        *outer, last = zip(view.shape, view.stride(), strict=True) if view.dim() else [(1, 1)]
        step = last[1] if last[0] > 1 else 1
        run = (last[0] - 1) * step + 1
        while step == 1 and outer and outer[-1][1] == run:
            run *= outer.pop()[0]
        whole = torch.empty(math.prod(size for size, _ in outer), run, dtype=entry.dtype)
        raw, width = raw_bytes(whole), run * entry.dtype.itemsize
        with self._opened() as file:
            for number, places in enumerate(itertools.product(*(range(size) for size, _ in outer))):
                first = int(view.storage_offset()) + sum(
                    k * s for k, (_, s) in zip(places, outer, strict=True)
                )
                self._fill(file, entry.start + first * entry.dtype.itemsize, raw[number * width :][:width])
        return whole[:, ::step].reshape(view.shape).contiguous()

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Return the bytes of a tensor as stored, piece by piece, in one buffer that the next piece overwrites."""
        entry = self.entries[name]
        buffer = memoryview(bytearray(min(_CHUNK, entry.nbytes)))
        with self._opened() as file:
            for start in range(entry.start, entry.stop, _CHUNK):
                piece = buffer[: min(_CHUNK, entry.stop - start)]
                self._fill(file, start, piece)
                yield piece

    def _fill(self, file: FileIO, start: int, target: memoryview) -> None:
        try:
            file.seek(start)
            done = 0
            while done < len(target):  # one call reads 2 GiB at most
                count = file.readinto(target[done:])
                if not count:
                    raise self._broken("it ended while it was read")
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror}): {_REMEDY}") from error
        self.bytes_read += done


def _integers(value: Any) -> list[int] | None:
    """Return `value` if it is a list of integers; a number such as 20.0 or true is none."""
    return value if isinstance(value, list) and all(type(one) is int for one in value) else None


def write_tensorfile(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write and sync one safetensors file, in a folder of ours. Equal tensors, order and metadata give equal bytes.

    Wider dtypes come first and the given order is kept among equals, so that every tensor lies aligned. The
    file gets the user's default mode (the library's `save_file` leaves it readable by its owner alone). Raises
    OSError if the disk refuses.
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
    with path.open("xb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for _, tensor in order:
            file.write(raw_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, row-major; no copy if it is contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data
