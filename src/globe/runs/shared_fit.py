"""Share a fit between runs that differ in `S_cache`, a property of the patched forward, and in nothing else."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from globe.files import fresh_folder, link_or_copy, write_text
from globe.runs.folder import RunFolder, State

_log = logging.getLogger(__name__)


def adopt(folder: RunFolder, fit: str) -> Path | None:
    """Take the banks of a finished run of the same fit in the same parent folder; return that run, or None.

    `fit` is the identity at the end of their names. Banks are linked where the file system can, and otherwise
    copied; each appears whole. Whoever learns the banks next checks them, as it does with its own.
    """
    for path in sorted(folder.path.parent.glob(f"*_{fit}")):
        if path.resolve() == folder.path.resolve():
            continue
        other = RunFolder(path)
        if other.status is not None and other.status.state is State.finished:
            _take(other, folder)
            _log.info("the banks are those of %s: S_cache is no part of a fit", path)
            return path
    return None


def _take(other: RunFolder, folder: RunFolder) -> None:
    # figures first: a bank that is there counts as done
    for name in ("metrics_file", "frontier_file"):
        source, target = getattr(other, name), getattr(folder, name)
        if source.is_file():
            write_text(target, source.read_text("utf-8"))
    for source in sorted(other.banks.glob("*.json")):
        write_text(folder.banks / source.name, source.read_text("utf-8"))
    for source in sorted(one for one in other.banks.iterdir() if one.is_dir() and not _unfinished(one)):
        target = folder.banks / source.name
        if not target.exists():
            with fresh_folder(target) as fresh:
                shutil.copytree(source, fresh, copy_function=link_or_copy, dirs_exist_ok=True)


def _unfinished(bank: Path) -> bool:
    return bank.name.startswith(".") or bank.suffix == ".partial"
