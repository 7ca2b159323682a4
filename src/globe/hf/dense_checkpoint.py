"""The dense output: the original checkpoint with the selected experts replaced by their reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from globe.checkpoint import Checkpoint, Location, copy_checkpoint
from globe.checkpoint.experts import SHARED
from globe.checkpoint.quantised.reader import DequantisedReader
from globe.checkpoint.rewrite import copy_dequantised
from globe.errors import ArtefactError
from globe.hf.destination import destination, inputs_of, write_record
from globe.hf.run_banks import BankEntry, DenseExperts, verify_source


def write_dense(
    entries: tuple[BankEntry, ...], checkpoint: Checkpoint, out: str | Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write a checkpoint that any engine loads: upstream names, dtypes, files and everything else kept.

    Streams: one tensor of the checkpoint and the matrices of one layer are in memory, the model is never
    built. Only the bytes of the selected experts differ. A quantised checkpoint is dequantised as a whole, since
    engines want the experts of a layer quantised alike. `out` appears whole or not at all. Returns the
    record written beside the weights. Raises ArtefactError, CheckpointError or ConfigError before anything
    is written if a bank is not of this checkpoint or `out` is taken.
    """
    verify_source(entries, checkpoint)
    replace = rewriters(entries, checkpoint)
    with destination(out, overwrite=overwrite, inputs=inputs_of(entries, checkpoint)) as folder:
        if isinstance(checkpoint.reader, DequantisedReader):
            left_out = copy_dequantised(checkpoint.reader, checkpoint.config, folder, replace)
        else:
            left_out = copy_checkpoint(checkpoint.folder, folder, replace)
        return write_record(folder, "dense", entries, checkpoint, left_out)


class _Part(NamedTuple):
    """One matrix inside a stored tensor, and where its reconstruction comes from."""

    where: Location
    entry: BankEntry
    position: int
    row: int


def rewriters(
    entries: tuple[BankEntry, ...], checkpoint: Checkpoint, *, shared_only: bool = False
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return tensor name -> function that puts the reconstructions into the stored tensor, for `copy_checkpoint`.

    `shared_only` leaves the routed experts alone and does the always-on shared expert.
    """
    parts: dict[str, list[_Part]] = {}
    for entry in entries:
        for position, member in enumerate(entry.members):
            for row, expert in enumerate(member.experts):
                if shared_only and expert != SHARED:
                    continue
                where = checkpoint.locate(member.layer, member.family, expert)
                parts.setdefault(where.tensor, []).append(_Part(where, entry, position, row))
    dense = DenseExperts()
    return {name: _rewriter(chosen, dense) for name, chosen in parts.items()}


def _rewriter(parts: list[_Part], dense: DenseExperts) -> Callable[[Tensor], Tensor]:
    def rewrite(stored: Tensor) -> Tensor:
        for part in parts:
            matrix = dense(part.entry, part.position, part.row, stored.dtype)
            part.where.view(stored).copy_(matrix)
            if not bool(torch.isfinite(matrix).all()):
                raise ArtefactError(
                    f"{part.entry.folder} gives numbers for {part.where.tensor} that {stored.dtype} can't hold: "
                    "train it again with another normalise.scale"
                )
        return stored

    return rewrite
