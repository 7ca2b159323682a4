"""Where a patched checkpoint goes: a folder that appears whole or not at all, with a note of its making."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from globe.calibration.run import RECORD as CALIBRATION
from globe.checkpoint import Checkpoint
from globe.checkpoint.support import RECORD, copy_file
from globe.errors import CheckpointError, ConfigError
from globe.files import fresh_folder, read_record, write_json
from globe.hf.model_card import write_card
from globe.hf.run_banks import BankEntry, run_of


@contextmanager
def destination(out: str | Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield an empty folder for the checkpoint; at the end it becomes `out`.

    An exception leaves `out` as it was. With `overwrite`, the files of an earlier result of patching are replaced in
    the moment the new ones are whole, and what else is in the folder stays; anything else in the way is refused. So
    is a folder in one of the `inputs`, or around it: what is read while it is written. Raises ConfigError before
    anything is written, and CheckpointError if the disk refuses.
    """
    target = Path(out).absolute()
    _refuse_overlap(target, inputs)
    keep = check_destination(target, overwrite=overwrite)
    try:
        with fresh_folder(target, keep=keep) as folder:
            yield folder
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror or error}): make room or give another"
        ) from error


def check_destination(target: Path, *, overwrite: bool) -> tuple[str, ...]:
    """Return the names in `target` to be kept. Raises ConfigError if it holds something that may not be replaced."""
    if not os.path.lexists(target):
        return ()
    if not target.is_dir() or target.is_symlink():
        raise ConfigError(f"out={str(target)!r} exists and is not a folder: give another one")
    if not any(target.iterdir()):
        return ()
    if not overwrite:
        raise ConfigError(f"out={str(target)!r} is not empty: give another folder, or overwrite=true")
    record = read_record(target / RECORD)
    if record is None:
        raise ConfigError(
            f"out={str(target)!r} was not written by globe.patch (it has no readable {RECORD}), so overwrite=true "
            "won't replace it: give another folder"
        )
    files = record.get("files")
    if not isinstance(files, list) or not all(isinstance(one, str) for one in files):
        raise ConfigError(
            f"{target / RECORD} does not say which files are of globe.patch, so overwrite=true won't replace them: "
            "give another folder"
        )
    return tuple(_foreign(target, "", frozenset(files)))


def _foreign(target: Path, below: str, files: frozenset[str]) -> Iterator[str]:
    """Yield what is in a folder and not among `files`: the folders that hold none of them, and single files."""
    for path in sorted((target / below).iterdir()):
        name = below + path.name
        if path.is_dir() and not path.is_symlink() and any(one.startswith(f"{name}/") for one in files):
            yield from _foreign(target, f"{name}/", files)
        elif name not in files:
            yield name


def inputs_of(entries: tuple[BankEntry, ...], checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Return what is read for a patched checkpoint: its run, the model, and where links in the model's folder lead."""
    runs = {
        entry.folder.parent.parent if entry.folder.parent.name == "banks" else entry.folder
        for entry in entries
    }
    shards = [(checkpoint.folder / name).resolve() for name in checkpoint.reader.files]
    return (*runs, checkpoint.folder, *shards)


def _refuse_overlap(target: Path, inputs: Iterable[Path]) -> None:
    place = target.resolve()
    for one in map(Path.resolve, inputs):
        if one == place or place in one.parents or one in place.parents:
            raise ConfigError(
                f"out={str(target)!r} and {one}, which is read for it, overlap: give another folder"
            )


def write_record(
    folder: Path,
    form: str,
    entries: tuple[BankEntry, ...],
    checkpoint: Checkpoint,
    left_out: tuple[str, ...],
) -> dict[str, Any]:
    """Write and return the note: format, source, banks, parameters before and after, the files, what was left out.

    `kept` counts what an engine must hold of the families that were replaced; both shares are given, of those
    families and of the whole model. The files, by their names below `folder`, are those an overwriting call replaces.
    """
    calibration = run_of(entries[0].folder) / CALIBRATION
    if calibration.is_file():
        copy_file(calibration, folder / CALIBRATION)
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
    write_card(folder, form, entries, checkpoint, parameters)
    written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    reader = checkpoint.reader
    record = {
        "format": form,
        "source": checkpoint.source(),
        "banks": {
            entry.key: [f"layer {one.layer} {one.family}" for one in entry.members] for entry in entries
        },
        "kept_bytes": sum(entry.kept_bytes for entry in entries),
        "parameters": parameters,
        "source_file_bytes": sum((reader.folder / name).stat().st_size for name in reader.files),
        "files": sorted([*written, RECORD]),
        "left_out": list(left_out),
    }
    write_json(folder / RECORD, record)
    return record
