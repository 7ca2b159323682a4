"""What a model takes before and after: parameters against both denominators, bytes in files and in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from globe.bank.file import BankArtefact
from globe.checkpoint import Checkpoint, ShardReader
from globe.evaluation.subject import Subject
from globe.hf.footprint import Footprint, footprint
from globe.hf.swap import SHARED_BANKS


@dataclass(frozen=True, slots=True)
class Change:
    """A size of the original and of the model; None if there is no original, or the size is not known."""

    before: int | None
    after: int

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if self.before else None


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Exact counts. The families are the gate or up matrices, layer by layer, that were compressed."""

    places: tuple[tuple[int, str], ...]
    """layer and family of every compressed one; none for a model that says nothing of it"""
    family_parameters: Change | None
    """numbers of the dense families, and of the factors that stand for them; a dense checkpoint that was
    made from factors counts these"""
    model_parameters: Change
    """the same for the whole model"""
    family_bytes: Change | None
    """bytes of the families in the files: a dense checkpoint saves none"""
    model_bytes: Change
    """bytes of all tensors in the files"""
    dense_bytes: int | None
    """bytes of a dense checkpoint in the original's place: its own, or what it has once it is dequantised"""
    resident: Footprint
    """bytes of the model in memory, in the dtype of the evaluation, after it"""
    resident_original: Footprint | None


def measure_sizes(
    subject: Subject, original: Subject | None, model: nn.Module, dense: nn.Module | None
) -> ModelSizes:
    """Return the sizes of a model in memory and of its files, and of the original (`dense`) and its files."""
    stored = subject.checkpoint.stored_bytes if subject.checkpoint else _bytes(subject.reader)
    total = subject.checkpoint.total_parameters if subject.checkpoint else _numbers(subject.reader)
    before = None if original is None or original.checkpoint is None else original.checkpoint
    places, families, kept = _compressed(subject)
    family_bytes = None
    if subject.entries:
        assert subject.checkpoint is not None
        factors = sum(_bank_bytes(entry.read()) for entry in subject.entries)
        family_bytes = Change(_family_bytes(subject.checkpoint, families, places), factors)
        # patching dequantises a quantised checkpoint
        plain = families * subject.checkpoint.dtype(*places[0]).itemsize
        stored = subject.checkpoint.plain_bytes + factors - plain
    elif places and before is not None:
        held = subject.checkpoint
        after = (
            families * held.dtype(*places[0]).itemsize
            if held
            else _bytes(subject.reader, _factors(subject.reader))
        )
        family_bytes = Change(_family_bytes(before, families, places), after)
    if subject.checkpoint is not None:  # its files, or its original's, hold the families dense
        total += kept - families
    return ModelSizes(
        places=places,
        family_parameters=Change(families, kept) if places else None,
        model_parameters=Change(None if before is None else before.total_parameters, total),
        family_bytes=family_bytes,
        model_bytes=Change(None if before is None else before.stored_bytes, stored),
        dense_bytes=None if before is None else before.plain_bytes,
        resident=footprint(model),
        resident_original=None if dense is None else footprint(dense),
    )


def compressed_places(subject: Subject) -> tuple[tuple[int, str], ...]:
    """Return layer and family of everything that banks stand for in the model, as far as it says so."""
    if subject.entries:
        named = [(member.layer, member.family) for entry in subject.entries for member in entry.members]
    else:
        banks: Iterable[Any] = (subject.record or {}).get("banks", {}).values()
        words = [name.split() for members in banks for name in members]  # "layer 12 up"
        named = [(int(layer), family) for _, layer, family in words]
    return tuple(sorted(set(named)))


def _compressed(subject: Subject) -> tuple[tuple[tuple[int, str], ...], int, int]:
    """Return the compressed places, their parameters, and those of the factors."""
    if subject.entries:
        families = sum(entry.family_parameters for entry in subject.entries)
        kept = sum(entry.kept_parameters for entry in subject.entries)
    else:
        numbers = (subject.record or {}).get("parameters", {})
        families, kept = numbers.get("families", 0), numbers.get("kept", 0)
    return compressed_places(subject), families, kept


def _numbers(reader: ShardReader) -> int:
    entries = [reader.entry(name) for name in reader.names]
    return sum(one.nbytes // one.dtype.itemsize for one in entries if one.dtype.is_floating_point)


def _bytes(reader: ShardReader, names: Iterable[str] | None = None) -> int:
    return sum(reader.entry(name).nbytes for name in (reader.names if names is None else names))


def _factors(reader: ShardReader) -> list[str]:
    """Return the tensors of a compact checkpoint that stand for the compressed matrices."""
    own = [name for name in reader.names if ".globe_" in name or name.startswith(SHARED_BANKS)]
    return [name for name in own if not name.endswith(".dense")]


def _family_bytes(checkpoint: Checkpoint, families: int, places: tuple[tuple[int, str], ...]) -> int:
    """Return the bytes of so many numbers of the families in the files, scales of quantised ones among them."""
    name = checkpoint.locate(*places[0], 0).tensor
    return round(families * checkpoint.reader.stored_bytes([name]) / math.prod(checkpoint.reader.shape(name)))


def _bank_bytes(artefact: BankArtefact) -> int:
    """Return the bytes of what an engine needs of a bank; its scale is a note of how it was made."""
    return sum(tensor.nbytes for name, tensor in artefact.tensors().items() if name != "scale")
