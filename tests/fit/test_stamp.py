"""The mark of a checkpoint's files, by which a repeated command knows that nothing has changed."""

from __future__ import annotations

import os
from pathlib import Path

from globe.fit.provenance import stamp


def test_a_file_replaced_by_one_of_the_same_size_and_time_changes_the_stamp(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    before = stamp(str(tmp_path))
    assert stamp(str(tmp_path)) == before
    (tmp_path / "other").write_bytes(b"two")
    os.utime(tmp_path / "other", ns=times)
    os.replace(tmp_path / "other", file)
    assert file.stat().st_mtime_ns == times[1]
    assert stamp(str(tmp_path)) != before


def test_a_file_changed_in_place_with_its_time_put_back_changes_the_stamp(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    before = stamp(str(tmp_path))
    with file.open("r+b") as opened:
        opened.write(b"two")
    os.utime(file, ns=times)
    assert stamp(str(tmp_path)) != before
    assert stamp(str(tmp_path / "absent")) == stamp(None) == ""
