"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from globe.errors import CheckpointError


class FreshFolder:
    """A hidden folder beside `out` that becomes `out` at `commit` and is removed at `discard`.

    The rename is atomic, so a reader never sees half a checkpoint; a killed process leaves only the hidden
    folder. As a context manager it commits, or discards on an exception. Raises CheckpointError if `out`
    exists and is not an empty folder, or cannot be made.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out).absolute()
        self._check_free()
        self.path = self.out.parent / f".{self.out.name}.part-{os.getpid()}"
        """Where to put the files."""
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():  # of a killed process that had the same number
                shutil.rmtree(self.path)
            self.path.mkdir()
        except OSError as error:
            raise unwritable(self.out, error) from error

    def commit(self) -> None:
        """Make `out` appear. The files in it must be synced already."""
        self._check_free()
        try:
            _sync_folder(self.path)
            os.replace(self.path, self.out)
            _sync_folder(self.out.parent)
        except OSError as error:
            raise unwritable(self.out, error) from error

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()  # after a commit there is nothing left to remove

    def _check_free(self) -> None:
        if self.out.is_dir() and not any(self.out.iterdir()):
            return
        if self.out.exists() or self.out.is_symlink():
            raise CheckpointError(f"out={str(self.out)!r} exists already: remove it or give another folder")


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """The sentence for a disk that refuses."""
    return CheckpointError(f"{path} cannot be written ({error.strerror or error}): make room or give another")


def write_text(path: Path, text: str) -> None:
    """Write and sync a text file."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows can't open a folder, and need not
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
