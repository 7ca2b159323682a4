"""Sizes of expert matrices, from file headers alone, checked against each other and against the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from globe.checkpoint.architecture import FAMILIES, ConfigKeys, Layout, Slot
from globe.checkpoint.model_config import size_of
from globe.checkpoint.shards import ShardReader
from globe.errors import CheckpointError

READABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Sizes of the routed experts of one layer and family: n matrices of p rows and d columns."""

    n: int
    p: int
    d: int


def routed_shape(
    reader: ShardReader, layout: Layout, family: str, layer: int, config: dict[str, Any], keys: ConfigKeys
) -> ExpertShape:
    """Return n, p, d of the routed experts; the layout must have the family.

    Raises CheckpointError for a dtype GloBE does not read, experts that differ in shape or dtype, and sizes
    or counts that contradict the other families or the config.
    """
    slot = layout.slot(family)
    assert slot is not None
    n = _count(reader, layout, layer, size_of(config, keys.experts, layer))
    name = slot.name(layer, 0)
    p, d = matrix_shape(reader, slot, name, axes=3 if slot.fused and not slot.stacked else 2)
    if slot.stacked:
        if p % n:
            raise CheckpointError(
                f"{name} in {reader.folder} has {p} rows, which the {n} experts of config.json cannot share: correct "
                "config.json, or save or download both again"
            )
        p //= n
    first = reader.entry(name)
    for expert in range(1, 1 if slot.fused else n):
        other = slot.name(layer, expert)
        entry = reader.entry(other)
        if (entry.shape, entry.dtype) != (first.shape, first.dtype):
            remedy = (
                "convert them to one dtype" if entry.shape == first.shape else "give all experts one shape"
            )
            raise CheckpointError(
                f"{other} in {reader.folder} is {entry.dtype} {list(entry.shape)}, but expert 0 "
                f"is {first.dtype} {list(first.shape)}: {remedy}, or save or download the checkpoint again"
            )
    rows, columns = size_of(config, keys.rows, layer), size_of(config, keys.columns, layer)
    wanted = (rows, columns)
    if any(promised not in (None, got) for got, promised in zip((p, d), wanted, strict=True)):
        raise CheckpointError(
            f"{name} in {reader.folder} holds {p} x {d} matrices where config.json promises "
            f"{wanted[0] or p} x {wanted[1] or d}: correct config.json, or save or download both again"
        )
    return ExpertShape(n, p, d)


def matrix_shape(reader: ShardReader, slot: Slot, name: str, *, axes: int) -> tuple[int, int]:
    """Return p and d of the matrices in a stored tensor that should have so many axes. Raises CheckpointError."""
    entry = reader.entry(name)
    if entry.dtype not in READABLE:
        raise CheckpointError(
            f"{name} in {reader.folder} is stored as {entry.dtype}, a quantised form GloBE does not read: "
            "convert the checkpoint to bfloat16 first"
        )
    if len(entry.shape) != axes or 0 in entry.shape:
        raise CheckpointError(
            f"{name} in {reader.folder} has shape {list(entry.shape)} where {axes} axes are due: "
            "save or download it again"
        )
    p, d = entry.shape[-1 if slot.transposed else -2], entry.shape[-2 if slot.transposed else -1]
    if slot.half is None:
        return p, d
    if p % 2:
        raise CheckpointError(
            f"{name} in {reader.folder} has {p} rows, which gate and up cannot share: save or download it again"
        )
    return p // 2, d


def _count(reader: ShardReader, layout: Layout, layer: int, promised: int | None) -> int:
    """Return the number of routed experts, on which all families and the config must agree."""
    counts: dict[str, int] = {}
    for family in FAMILIES:
        slot = layout.slot(family)
        if slot is None:
            continue
        first = slot.name(layer, 0)
        if slot.stacked:
            if promised is None or promised < 1:
                raise CheckpointError(
                    f"{reader.folder}/config.json does not say how many experts share the rows of {first}: correct it"
                )
            counts[family] = promised if first in reader else 0
        elif slot.fused:
            counts[family] = next(iter(reader.shape(first)), 0) if first in reader else 0
        else:
            expert = 0
            while slot.name(layer, expert) in reader:
                expert += 1
            counts[family] = expert
    held = set(counts.values())
    if len(held) > 1:
        raise CheckpointError(
            f"layer={layer} of {reader.folder} has other numbers of expert matrices ({_listed(counts)}) than the "
            f"{promised if promised is not None else max(held)} promised: save or download the checkpoint again"
        )
    (count,) = held
    if promised is not None and count != promised:
        raise CheckpointError(
            f"layer={layer} of {reader.folder} has {count} experts where config.json promises "
            f"{promised}: give config.json the right number or, if layers differ, prune all alike, since transformers "
            "can't load others"
        )
    return count


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} of {family}" for family, count in counts.items())
