"""The files of a report in a folder that may hold other things: `report.json` lists what is ours."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from globe.errors import ConfigError
from globe.files import read_record, write_bytes, write_json

MANIFEST = "report.json"
_FORMAT = "globe-report"


def publish(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the files into a folder, each atomically, and remove those of an earlier report that are no longer made.

    The list is written before the first file, so that a kill leaves nothing that a later report would not know.

    Raises
    ------
    ConfigError, before anything is written, if a file is there that no earlier report has listed.
    """
    out.mkdir(parents=True, exist_ok=True)
    listed = _listed(out)
    for name in (*files, MANIFEST):
        _check_ours(out, name, name in listed or (name == MANIFEST and bool(listed)))
    new = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    _write_list(out, listed | new)
    for name in listed.keys() - new.keys():
        if _digest(out / name) == listed[name]:  # what somebody has changed since stays
            (out / name).unlink()
    for name, content in files.items():
        write_bytes(out / name, content)
    _write_list(out, new)


def _listed(out: Path) -> dict[str, str]:
    """Return the files of the report that is in the folder and their hashes; none if there is no report."""
    record = read_record(out / MANIFEST) if (out / MANIFEST).is_file() else None
    if record is None or record.get("format") != _FORMAT or not isinstance(record.get("files"), dict):
        return {}
    return {name: str(digest) for name, digest in record["files"].items() if Path(name).name == name}


def _check_ours(out: Path, name: str, ours: bool) -> None:
    file = out / name
    if not os.path.lexists(file):
        return
    if not ours:
        raise ConfigError(
            f"{file} is there, and no report in {out} has listed it in {MANIFEST}: give another out, or move it away"
        )
    if not stat.S_ISREG(file.lstat().st_mode):
        raise ConfigError(f"{file} is no file but something else: give another out, or move it away")


def _digest(file: Path) -> str | None:
    if file.is_symlink() or not file.is_file():
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write_list(out: Path, files: Mapping[str, str]) -> None:
    write_json(out / MANIFEST, {"format": _FORMAT, "files": dict(files)})
