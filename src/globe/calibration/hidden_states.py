"""Hidden states between two decoder layers, on disk: what a pass goes on from after a kill."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from globe.errors import ArtefactError
from globe.files import plain_record, read_as, sync, write_json


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pass is: the hidden states before layer `next` are on disk."""

    next: int
    shape: tuple[int, ...]
    dtype: str
    wrapped: int | None
    """`Decoder.wrapped`"""


class HiddenStates:
    """The hidden states of all windows before one layer, in a file of a folder; those after it go to another file.

    A file counts once `progress.json` names it, and that is written last. With `keep` the files of all layers stay
    until the pass is done.
    """

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        self._folder, self._keep = folder, keep
        self._record = folder / "progress.json"

    @property
    def records(self) -> tuple[Path, ...]:
        """The files that are written atomically."""
        return (self._record,)

    def found(self) -> Progress | None:
        """Return how far an earlier pass came; None for no pass, or one whose file is not whole."""
        progress = read_as(Progress, self._record)
        if progress is None:
            return None
        try:
            size = torch.Size(progress.shape).numel() * getattr(torch, progress.dtype).itemsize
            return progress if self._file(progress.next).stat().st_size == size else None
        except (OSError, ValueError, AttributeError):
            return None

    def read(self, progress: Progress) -> Tensor:
        """Return the hidden states (windows, tokens, ...), mapped from the file: copy what is to be worked on."""
        return self._map(progress.next, progress.shape, getattr(torch, progress.dtype))

    def create(self, layer: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return room for the hidden states before `layer`, to be written in place."""
        return self._map(layer, shape, dtype)

    def commit(self, progress: Progress) -> None:
        """Let the states before layer `progress.next`, all written, take the place of those before the last layer."""
        sync(self._file(progress.next))
        write_json(self._record, plain_record(progress))
        if not self._keep:
            self._remove(keep=progress.next)

    def clear(self) -> None:
        """Remove the files: the pass is done."""
        self._record.unlink(missing_ok=True)
        self._remove(keep=None)

    def _remove(self, keep: int | None) -> None:
        for path in self._folder.glob("hidden-*.bin"):
            if keep is None or path != self._file(keep):
                path.unlink()

    def _file(self, layer: int) -> Path:
        return self._folder / f"hidden-{layer:03d}.bin"

    def _map(self, layer: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        path, numbers = self._file(layer), torch.Size(shape).numel()
        try:
            with path.open("ab") as file:
                size = numbers * dtype.itemsize
                # room that is really there: a full disk is no bus error later
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
            return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).view(*shape)
        except (OSError, RuntimeError) as error:
            raise ArtefactError(
                f"{path} can't be written ({error}): make room for the hidden states, or give calibrate.out"
            ) from error
