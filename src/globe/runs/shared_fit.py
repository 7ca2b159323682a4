"""Runs that share a fit: they differ in `S_cache`, a property of the patched forward, and in nothing else."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from pathlib import Path

from globe.runs.folder import RunFolder, State, write_text

_log = logging.getLogger(__name__)


def adopt(folder: RunFolder, fit: str) -> Path | None:
    """Take the banks of a finished run of the same fit in the same parent folder; None if there is none.

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
            temporary = folder.banks / f".{source.name}.{secrets.token_hex(4)}"
            shutil.copytree(source, temporary, copy_function=_link)
            os.rename(temporary, target)


def _unfinished(bank: Path) -> bool:
    return bank.name.startswith(".") or bank.suffix == ".partial"


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
