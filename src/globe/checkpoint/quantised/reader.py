"""A quantised checkpoint as the plain one it stands for: the same names, dtypes and shapes as if never quantised."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from globe.checkpoint.model_config import is_quantised, parts_of
from globe.checkpoint.quantised.form import Form, Settings
from globe.checkpoint.quantised.schemes import METHODS, Method, SettingsOf
from globe.checkpoint.shards import ShardReader
from globe.checkpoint.tensorfile import Index, TensorEntry
from globe.errors import CheckpointError

KEYS = ("quantization_config", "compression_config")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_OF_ACTIVATIONS = re.compile(r".*[._](?:input|output|activation|[qkv])_(?:scale|global_scale|zero_point)")
"""What quantises activations and the cache, of which a plain checkpoint has none."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A quantised matrix, or a stack of them, and the tensors it is made of."""

    form: Form
    settings: Settings
    parts: Mapping[str, str]
    """Suffix -> name of the stored tensor."""
    entry: TensorEntry
    """Dtype and shape as read; the bytes are none of a file."""
    stacked: bool
    """The first axis counts experts."""


class DequantisedReader(ShardReader):
    """The tensors of a quantised checkpoint by the names of the plain one; matrices are dequantised as they are read.

    Computed in float32 and rounded once to the dtype that `config.json` names (bfloat16 where it names none). Of a
    stack of experts only those of the index are read. Opening reads headers only.
    """

    def __init__(
        self, stored: ShardReader, method: str, config: Mapping[str, Any], quantisation: Mapping[str, Any]
    ) -> None:
        """Raise CheckpointError for a method, format or tensors that are not read."""
        self.stored = stored
        self.method = method
        self.folder = stored.folder
        self._open = stored._open
        self.plain_dtype = _dtype(config)
        if all(_is_plain(stored.dtype(name)) and not is_quantised(name) for name in stored.names):
            raise _not_quantised(stored, method)
        known = _method(method, stored)
        try:
            settings_of = known.settings(quantisation)
        except (ValueError, TypeError, re.error) as error:
            raise self._not_read(error) from error
        self._matrices: dict[str, _Matrix] = {}
        whole, rest = self._main_tensors(known.forms)
        for name, form in whole.items():
            self._add(name, form, settings_of)
        used = {part for matrix in self._matrices.values() for part in matrix.parts.values()}
        for name, form in rest.items():
            if name not in used and not _OF_ACTIVATIONS.fullmatch(name):
                raise CheckpointError(
                    f"{name} in {self.folder} is quantised with {self.method!r} and lacks "
                    f"{self._missing(name, form)[0]}: save or download the checkpoint again"
                )
        if not self._matrices:
            raise _not_quantised(stored, method)
        kept = (name for name in stored.names if name not in used and not _OF_ACTIVATIONS.fullmatch(name))
        self.index = {name: stored.index[name] for name in kept}
        self.index |= {
            name: stored.index[matrix.parts[matrix.form.main]] for name, matrix in self._matrices.items()
        }

    def _not_read(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}/config.json says {self.method!r} in a way that GloBE does not read ({error}): convert the "
            "checkpoint to bfloat16 first"
        )

    def entry(self, name: str) -> TensorEntry:
        """Return dtype and shape of a tensor as it is read; `nbytes` of a quantised one are those of the plain one."""
        return self._matrices[name].entry if name in self._matrices else super().entry(name)

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """Return the tensor, or `tensor[index]`. Raises CheckpointError where parts contradict each other."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return super().read(name, index)
        places = () if index is None else index if isinstance(index, tuple) else (index,)
        if not matrix.stacked:
            return self._dequantised(name, matrix, None)[places].contiguous()
        first, rest = (places[0], places[1:]) if places else (slice(None), ())
        if isinstance(first, int):
            return self._dequantised(name, matrix, first)[rest].contiguous()
        experts = range(matrix.entry.shape[0])[first]
        whole = torch.empty(len(experts), *matrix.entry.shape[1:], dtype=matrix.entry.dtype)
        for target, expert in zip(whole, experts, strict=True):
            target.copy_(self._dequantised(name, matrix, expert))
        return whole[(slice(None), *rest)].contiguous()

    def hash(self, names: Iterable[str]) -> str:
        """Return the SHA-256 of the stored bytes of the tensors, those of quantised ones with their scales."""
        return self.stored.hash(part for name in names for part in self._parts_of(name))

    def stored_bytes(self, names: Iterable[str]) -> int:
        return self.stored.stored_bytes(part for name in names for part in self._parts_of(name))

    def _parts_of(self, name: str) -> Iterable[str]:
        return self._matrices[name].parts.values() if name in self._matrices else (name,)

    def _main_tensors(self, forms: tuple[Form, ...]) -> tuple[dict[str, Form], dict[str, Form]]:
        """Return the main tensors that have all they need beside them, and what looks like one and has not."""
        whole: dict[str, Form] = {}
        rest: dict[str, Form] = {}
        for name in self.stored.names:
            fitting = [form for form in forms if form.matches(name, self.stored.dtype(name))]
            complete = [form for form in fitting if not self._missing(name, form)]
            if complete:
                whole[name] = complete[0]
            elif fitting:
                rest[name] = fitting[0]
        return whole, rest

    def _add(self, name: str, form: Form, settings_of: SettingsOf) -> None:
        """Check the tensors of the matrix whose main tensor is `name`, and remember it."""
        base = name.removesuffix(form.main)
        parts = {
            suffix: base + suffix
            for suffix in (form.main, *form.needs, *form.takes)
            if base + suffix in self.stored
        }
        plain = base + form.replaced_by
        try:
            settings = settings_of(plain)
        except ValueError as error:
            raise self._not_read(error) from error
        axes = len(self.stored.shape(name))
        stacked = axes == form.axes + 1
        count = self.stored.shape(name)[0] if stacked else None
        entries = {suffix: _of_one(self.stored.entry(part), count) for suffix, part in parts.items()}
        try:
            if axes not in (form.axes, form.axes + 1):
                raise ValueError(f"it has the shape {list(self.stored.shape(name))}")
            shape: tuple[int, ...] = form.shape(entries, settings)
        except (ValueError, IndexError) as error:
            raise self._contradicts(name, error) from error
        if plain in self.stored and plain not in parts.values():
            raise CheckpointError(
                f"{plain} and {name} in {self.folder} are the same matrix: remove one of the two"
            )
        shape = shape if count is None else (count, *shape)
        size = math.prod(shape) * self.plain_dtype.itemsize
        self._matrices[plain] = _Matrix(
            form, settings, parts, TensorEntry(self.plain_dtype, shape, 0, size), stacked
        )

    def _missing(self, name: str, form: Form) -> list[str]:
        base = name.removesuffix(form.main)
        return [base + suffix for suffix in form.needs if base + suffix not in self.stored]

    def _dequantised(self, name: str, matrix: _Matrix, expert: int | None) -> Tensor:
        count = matrix.entry.shape[0] if matrix.stacked else None
        parts = {
            suffix: self.stored.read(part, expert if _counts(self.stored.shape(part), count) else None)
            for suffix, part in matrix.parts.items()
        }
        try:
            return matrix.form.values(parts, matrix.settings).to(self.plain_dtype)
        except (ValueError, IndexError) as error:
            raise self._contradicts(name, error) from error

    def _contradicts(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{name} in {self.folder} is quantised with {self.method!r} and its tensors do not fit together ({error}): "
            "save or download the checkpoint again"
        )


def open_quantised(stored: ShardReader, config: Mapping[str, Any]) -> ShardReader:
    """Return the reader of a checkpoint: the stored tensors, or what they stand for if the config says quantised."""
    found = _quantisation(config)
    return stored if found is None else DequantisedReader(stored, found[0], config, found[1])


def is_readable(config: Mapping[str, Any]) -> bool:
    """Return whether the config says that the weights are quantised by a method of the table."""
    found = _quantisation(config)
    return found is not None and found[0] in METHODS


def _quantisation(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return the method and what else the config says of it; None if it says that nothing is quantised."""
    for part in parts_of(config):
        for key in KEYS:
            if (record := part.get(key)) is not None:
                found = record if isinstance(record, dict) else {}
                fallback = "compressed-tensors" if key == "compression_config" else "unknown"
                return str(found.get("quant_method") or fallback), found
    return None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config.json` of the plain checkpoint that a quantised one stands for."""
    plain = {key: value for key, value in config.items() if key not in KEYS}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in text.items() if key not in KEYS}
    dtype = str(_dtype(config)).removeprefix("torch.")
    old = [key for key in ("torch_dtype", "dtype") if key in plain]
    return plain | dict.fromkeys(old or ["dtype"], dtype)


def forget_quantisation(config: Any) -> None:
    """Let a configuration of transformers describe the plain model, in place."""
    for part in (config, getattr(config, "text_config", None)):
        for key in KEYS:
            if part is not None and key in vars(part):
                delattr(part, key)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of the plain checkpoint: the one the config names, otherwise bfloat16."""
    named = [part.get(key) for part in parts_of(config) for key in ("dtype", "torch_dtype")]
    return next((_DTYPES[one] for one in named if isinstance(one, str) and one in _DTYPES), torch.bfloat16)


def _method(name: str, stored: ShardReader) -> Method:
    if name not in METHODS:
        raise CheckpointError(
            f"{stored.folder} holds weights quantised with {name[:40]!r}, which GloBE does not read (it reads "
            f"{', '.join(METHODS)}): convert it to bfloat16 first"
        )
    return METHODS[name]


def _is_plain(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _not_quantised(stored: ShardReader, method: str) -> CheckpointError:
    return CheckpointError(
        f"{stored.folder}/config.json says that the weights are quantised with {method[:40]!r}, but they are not: "
        "remove its key quantization_config"
    )


def _counts(shape: tuple[int, ...], count: int | None) -> bool:
    """Return whether the first axis of a part counts the experts of a stack."""
    return count is not None and bool(shape) and shape[0] == count


def _of_one(entry: TensorEntry, count: int | None) -> TensorEntry:
    """Return the header of one expert's part of a stack."""
    if not _counts(entry.shape, count):
        return entry
    return TensorEntry(entry.dtype, entry.shape[1:], entry.start, entry.stop)
