"""Files and folders that appear whole or not at all, and readers that no file can hang, flood or crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from globe.errors import LONGEST, ConfigError, GlobeError, sentence
from globe.files import (
    clear_files,
    fresh_folder,
    lock,
    parse_json,
    parse_record,
    read_bytes,
    read_json,
    read_record,
    replacing,
    sha256,
    write_bytes,
    write_json,
    write_text,
)

# sentences


def test_sentences_are_one_printable_line_of_bounded_length() -> None:
    said = str(GlobeError("a\x1b[2Jb \u202ec\n\n  d\ud800: remove it"))
    assert said == r"a\x1b[2Jb \u202ec d\ud800: remove it"
    assert sentence("it has ä, 漢 and 'quotes'") == "it has ä, 漢 and 'quotes'"
    long = sentence("\x00" * 10**7 + ": remove it")
    assert len(long) == LONGEST
    assert long.endswith(": remove it")
    assert long.isprintable()
    assert len(sentence("x" * LONGEST)) == LONGEST


# files


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    write_json(tmp_path / "b.json", {"b": 1.5, "a": [None]})
    write_bytes(tmp_path / "c", b"\x00")
    assert (tmp_path / "a").read_text() == "two"
    assert (tmp_path / "b.json").read_text() == '{\n "a": [\n  null\n ],\n "b": 1.5\n}\n'
    assert sorted(os.listdir(tmp_path)) == ["a", "b.json", "c"]
    assert sha256(tmp_path / "c") == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_text(tmp_path / "a", "one")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a", "two")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "one"


def test_an_exception_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")

    def fail() -> None:
        with replacing(tmp_path / "a") as file:
            file.write(b"tw")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "a").read_text() == "one"
    assert os.listdir(tmp_path) == ["a"]


def special(kind: str, path: Path) -> None:
    """Make something that is no regular file at `path`; skip where the system does not let us."""
    match kind:
        case "link":
            (path.parent / "other").write_text("precious")
            path.symlink_to(path.parent / "other")
        case "dangling":
            path.symlink_to(path.parent / "absent")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            try:
                os.mknod(path, 0o666 | 0o020000, os.makedev(1, 7))  # a full device of our own
            except PermissionError:
                pytest.skip("only root makes device nodes")


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe", "device"])
@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), lambda path: lock(path).__enter__()])
def test_nothing_but_regular_files_is_written(
    tmp_path: Path, kind: str, write: Callable[[Path], None]
) -> None:
    special(kind, tmp_path / "a")
    before = os.lstat(tmp_path / "a")
    with pytest.raises(ConfigError, match="a is not a regular file"):
        write(tmp_path / "a")
    after = os.lstat(tmp_path / "a")
    assert (before.st_ino, before.st_mode, before.st_rdev) == (after.st_ino, after.st_mode, after.st_rdev)
    if kind == "link":
        assert (tmp_path / "other").read_text() == "precious"
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "dangling"])
def test_nothing_but_regular_files_is_read(tmp_path: Path, kind: str) -> None:
    special(kind, tmp_path / "a")
    with pytest.raises((ValueError, FileNotFoundError)):
        read_json(tmp_path / "a")
    with pytest.raises((ValueError, FileNotFoundError)):
        sha256(tmp_path / "a")


def test_a_lock_keeps_others_out_and_the_content_in(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("precious")
    with lock(tmp_path / ".lock"), pytest.raises(BlockingIOError):
        lock(tmp_path / ".lock").__enter__()
    with lock(tmp_path / ".lock"):
        pass
    assert (tmp_path / ".lock").read_text() == "precious"


def test_a_lock_is_let_go_of_by_a_kill(tmp_path: Path) -> None:
    code = "from sys import argv; from pathlib import Path; from globe.files import lock\n"
    code += "with lock(Path(argv[1])): print(1, flush=True), input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(BlockingIOError):
            lock(tmp_path / ".lock").__enter__()
        holder.kill()
    with lock(tmp_path / ".lock", wait=True):
        pass


# folders


def test_a_folder_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with fresh_folder(tmp_path / "deep" / "out") as folder:
            assert os.listdir(folder) == []
            (folder / content).write_text(content)
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert os.listdir(tmp_path / "deep" / "out") == ["two"]


def test_what_is_kept_moves_into_the_new_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "mine" / "below").mkdir(parents=True)
    (out / "mine" / "below" / "notes").write_text("precious")
    (out / "mine" / "link").symlink_to("below/notes")
    (out / "old").write_text("old")
    (out / "dangling").symlink_to("absent")
    os.mkfifo(out / "mine" / "pipe")
    with fresh_folder(out, keep=("mine", "dangling")) as folder:
        (folder / "new").write_text("new")
    assert sorted(os.listdir(out)) == ["dangling", "mine", "new"]
    assert (out / "mine" / "below" / "notes").read_text() == "precious"
    assert os.readlink(out / "mine" / "link") == "below/notes"
    assert (out / "mine" / "pipe").is_fifo()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_earlier_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "one").touch()
    plain, calls = os.rename, []

    def fail(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        plain(source, target)

    def write() -> None:
        with fresh_folder(tmp_path / "out") as folder:
            (folder / "two").touch()

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["one"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from globe.files import fresh_folder

    rename, calls = os.rename, []

    def counting(source, target):
        calls.append(source)
        if len(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = counting
    with fresh_folder(Path(sys.argv[1]) / "out") as folder:
        (folder / "two").write_text("two")
        if sys.argv[2] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_killed_process_leaves_the_old_folder_and_the_next_start_cleans_up(
    tmp_path: Path, moment: int
) -> None:
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "one").touch()
    for foreign in (".backup-20240131", ".out.globe-20240131", ".out.globe-1234abcd.old"):  # of somebody else
        (tmp_path / foreign).mkdir()
        (tmp_path / foreign / "precious").touch()
    before = set(os.listdir(tmp_path))
    code = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), tmp_path, str(moment)], check=False)
    assert code.returncode == -signal.SIGKILL
    assert len(set(os.listdir(tmp_path)) | before) == len(before) + 1
    with fresh_folder(tmp_path / "elsewhere"):  # another target in the same folder is enough
        assert os.listdir(tmp_path / "out") == ["one"]
    assert set(os.listdir(tmp_path)) == before | {"elsewhere"}


def test_a_living_process_keeps_its_unfinished_folder(tmp_path: Path) -> None:
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "one").touch()
        with fresh_folder(tmp_path / "other"):
            pass
        assert (folder / "one").exists()
    assert os.listdir(tmp_path / "out") == ["one"]


def test_only_leftovers_of_the_named_files_are_removed(tmp_path: Path) -> None:
    for name in (".a.globe-0123abcd", ".b.globe-0123abcd", ".a.globe-0123abcX", ".a.backup-20240131", "a"):
        (tmp_path / name).touch()
    (tmp_path / ".a.globe-ffffffff").symlink_to("a")
    clear_files([tmp_path / "a"])
    assert ".a.globe-0123abcd" not in os.listdir(tmp_path)
    assert len(os.listdir(tmp_path)) == 5


# readers


HOSTILE = {
    "nested": b"[" * 10**5,
    "nested objects": b'{"a":' * 10**5,
    "nested and closed": b"[" * 70 + b"]" * 70,
    "infinite": b"[1e999]",
    "NaN": b'{"a": NaN}',
    "minus infinity": b"[-Infinity]",
    "5,000 digits": b"9" * 5000,
    "a key twice": b'{"a": 1, "b": 2, "a": 3}',
    "not UTF-8": b'"\xff"',
    "a byte-order mark": b"\xef\xbb\xbf{}",
    "cut": b'{"a": ',
    "empty": b"",
    "many lists": b"[" + b"[]," * 10**6 + b"[]]",
    "many texts": b"[" + b'"",' * 1_300_000 + b'""]',
    "many numbers": b"[" + b"0," * 4_100_000 + b"0]",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_json_is_refused_with_a_reason(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^(it|the key 'a'|Exceeds)"):
        read_json(tmp_path / "a.json")
    assert read_record(tmp_path / "a.json") is None


def test_what_is_said_of_a_file_that_is_ignored_is_one_short_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_record(tmp_path / ("x\x1b" * 300)) is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].isprintable()
    assert len(caplog.messages[0]) <= LONGEST


def test_what_others_write_is_read_less_strictly() -> None:
    found = parse_json(b'{"limit": [0.0, Infinity], "a": 1, "a": 2}', strict=False)
    assert found == {"limit": [0.0, float("inf")], "a": 2}
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        parse_json(b"[" * 5000, strict=False)
    assert parse_json(b"[" * 64 + b"]" * 64) is not None
    assert parse_json(b"3") == 3


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="it has more than 4 bytes"):
        read_bytes(tmp_path / "a", 4)
    assert read_record(tmp_path / "absent") is None


class Colour(StrEnum):
    red = "red"


@dataclass(frozen=True, slots=True)
class Inner:
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    colour: Colour
    share: float
    inner: dict[str, Inner]
    note: str | None = None


GOOD = {"name": "a", "colour": "red", "share": 1, "inner": {"x": {"sizes": [1, 2]}}}


def test_records_come_back_with_their_types() -> None:
    assert parse_record(Outer, GOOD) == Outer("a", Colour.red, 1.0, {"x": Inner((1, 2))})
    assert parse_record(Outer, json.loads('{"later": 1}') | GOOD | {"note": "n"}).note == "n"


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"name": 3}, "name"),
        ({"colour": "blue"}, "colour"),
        ({"share": "1"}, "share"),
        ({"share": True}, "share"),
        ({"inner": {"x": {"sizes": [1.5]}}}, "inner.x.sizes.0"),
        ({"inner": {"x": {}}}, "inner.x.sizes"),
        ({"inner": [1]}, "inner"),
    ],
)
def test_records_of_other_types_are_refused_with_the_place(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=rf"^{place}: "):
        parse_record(Outer, GOOD | changes)
