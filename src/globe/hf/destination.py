"""Where a patched checkpoint goes: a folder that appears whole or not at all, with a note of its making."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from globe.calibration.run import RECORD as CALIBRATION
from globe.checkpoint import Checkpoint
from globe.errors import ConfigError
from globe.files import fresh_folder, unwritable, write_json
from globe.hf.model_card import write_card
from globe.hf.run_banks import BankEntry, run_of

RECORD = "globe_patch.json"
"""In every folder patching writes: the banks that are in it, and what it replaces. Engines ignore it."""


@contextmanager
def destination(out: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder for the checkpoint; at the end it becomes `out`.

    An exception leaves `out` as it was. With `overwrite`, an earlier result of patching is replaced in the
    moment the new one is whole; anything else in the way is refused. Raises ConfigError before anything is
    written, and CheckpointError if the disk refuses.
    """
    target = Path(out).absolute()
    check_destination(target, overwrite=overwrite)
    try:
        with fresh_folder(target) as folder:
            yield folder
    except OSError as error:
        raise unwritable(target, error) from error


def check_destination(target: Path, *, overwrite: bool) -> None:
    """Raises ConfigError if `target` holds something that may not be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise ConfigError(f"out={str(target)!r} exists and is not a folder: give another one")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"out={str(target)!r} is not empty: give another folder, or overwrite=true")
    if not (target / RECORD).is_file():
        raise ConfigError(
            f"out={str(target)!r} was not written by globe.patch (it has no {RECORD}), so overwrite=true "
            "won't replace it: give another folder"
        )


def write_record(
    folder: Path, form: str, entries: tuple[BankEntry, ...], checkpoint: Checkpoint
) -> dict[str, Any]:
    """Write and return the note: format, source, banks, and parameters before and after.

    `kept` counts what an engine must hold of the families that were replaced; both shares are given, of those
    families and of the whole model.
    """
    families = sum(entry.family_parameters for entry in entries)
    kept = sum(entry.kept_parameters for entry in entries)
    total = checkpoint.total_parameters
    parameters: dict[str, Any] = {
        "model": total,
        "families": families,
        "kept": kept,
        "kept_of_families": kept / families,
        "kept_of_model": (total - families + kept) / total,
    }
    record = {
        "format": form,
        "source": checkpoint.source(),
        "banks": {
            entry.key: [f"layer {one.layer} {one.family}" for one in entry.members] for entry in entries
        },
        "kept_bytes": sum(entry.kept_bytes for entry in entries),
        "parameters": parameters,
    }
    write_json(folder / RECORD, record)
    write_card(folder, form, entries, checkpoint, parameters)
    calibration = run_of(entries[0].folder) / CALIBRATION
    if calibration.is_file():
        shutil.copyfile(calibration, folder / CALIBRATION)
    return record
