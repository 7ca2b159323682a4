"""Files and folders that appear whole or not at all, and readers that no file can hang, flood or crash.

Every writer makes its result under a hidden name beside the target, `.NAME.globe-` and eight hexadecimal digits,
syncs it, and renames it. After a kill or a full disk there is the old result or the new one. Nothing is written
through a symbolic link, and nothing else than a regular file is replaced.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from globe.errors import ConfigError, sentence

T = TypeVar("T")
_log = logging.getLogger(__name__)

LARGEST_JSON = 64 << 20
"""Bytes; the index of a model of 300,000 tensors has half of that."""
_MOST_CONTAINERS = 700_000
"""Objects and lists in one JSON file, each of which takes up to 300 bytes of memory once it is read."""
_MOST_TEXTS = 1_200_000
"""Texts in one JSON file, keys included, of up to 200 bytes of memory each: an index of 300,000 tensors has half."""
_MOST_VALUES = 4_000_000
"""Values of any kind in one JSON file, of up to 32 bytes of memory each beside their content."""
_DEEPEST = 64
_NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_BINARY: int = getattr(os, "O_BINARY", 0)
_PATIENT: int = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
"""Flags with which opening a pipe does not wait for its other end, and a terminal does not become ours."""
_MARK = "globe-unfinished"
"""File that tells a folder of ours from another of that name, and is locked as long as it is written to."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file open for writing that becomes `path` at the end; an exception leaves `path` as it was.

    Raises ConfigError if `path` is a symbolic link, a folder or a device, and OSError if the disk refuses.
    """
    require_replaceable(path)
    temporary = _hidden(path)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; raises as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; raises as `replacing` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON with finite numbers, sorted and indented, atomically; raises as `replacing` does."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows can't open a folder, and need not
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises OSError, or ValueError if it is no regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: str | Path, target: str | Path) -> str:
    """Give a file a second name, or copy it where the file system has no such names; never follows a link."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        if not stat.S_ISREG(os.lstat(source).st_mode):
            raise
        shutil.copy2(source, target)
    return str(target)


def require_replaceable(path: Path) -> None:
    """Raise ConfigError if there is something else than a regular file."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ConfigError(
                f"{path} is not a regular file (it is a link, folder or device), so nothing is written there: "
                "remove it, or give another name"
            )


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.globe-{secrets.token_hex(4)}")


@contextmanager
def fresh_folder(target: Path, *, keep: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` at the end, synced; an exception leaves `target` as it was.

    An earlier folder at `target` is removed once the new one has its place, but for the files and folders named in
    `keep`, relative to it, which the new one takes over. A killed process leaves one hidden folder; the next call for a
    target in the same parent removes it, and puts an earlier `target` back that was out of its place just then.
    Whether an earlier folder may be replaced is the caller's to check. Raises OSError if the disk refuses.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_folders(target.parent)
    work = _hidden(target)
    work.mkdir()
    try:
        with lock(work / _MARK):
            # once it is held, see clear_folders
            (work / _MARK).write_text(f"{target.name}\n", encoding="utf-8")
            (work / "new").mkdir()
            yield work / "new"
            _take_place(work, target, keep)
    finally:
        _put_back(work, target)
        shutil.rmtree(work, ignore_errors=True)


def clear_folders(parent: Path) -> None:
    """Remove what killed processes left of `fresh_folder` for targets in `parent`."""
    for work in sorted(parent.glob(".*.globe-*")):
        found = re.fullmatch(r"\.(.+)\.globe-[0-9a-f]{8}", work.name)
        if found is None or work.is_symlink():
            continue
        with suppress(OSError, ValueError):  # no mark, or its process lives
            if read_bytes(work / _MARK, limit=4096).decode() == f"{found[1]}\n":
                with lock(work / _MARK):
                    _put_back(work, parent / found[1])
                    shutil.rmtree(work)


def clear_files(paths: Iterable[Path]) -> None:
    """Remove what killed processes left of writing these files; call it where no other process writes them."""
    for path in paths:
        for left in path.parent.glob(f".{path.name}.globe-*"):
            exact = re.fullmatch(re.escape(f".{path.name}.globe-") + r"[0-9a-f]{8}", left.name)
            if exact and stat.S_ISREG(left.lstat().st_mode):
                left.unlink()


def _take_place(work: Path, target: Path, keep: Iterable[str]) -> None:
    for name in keep:
        source, copy = target / name, work / "new" / name
        if os.path.lexists(copy):
            raise ConfigError(
                f"{source} is not of the earlier result and in the way of the new one: move it away"
            )
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, copy, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(source, copy)
    sync(work / "new")
    if target.is_dir():
        os.rename(target, work / "old")
    os.rename(work / "new", target)
    sync(target.parent)


def _put_back(work: Path, target: Path) -> None:
    if (work / "old").is_dir() and not os.path.lexists(target):
        os.rename(work / "old", target)


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file against other processes, which a kill lets go of; the file stays, with its content.

    With `wait`, wait for its holder. Raises BlockingIOError if another process holds it, ConfigError if `path` is
    not a regular file, and OSError if it cannot be opened. Nothing is held on file systems that have no such locks.
    """
    from filelock import FileLock, Timeout

    require_replaceable(path)
    held = FileLock(path, blocking=wait, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout as error:
        raise BlockingIOError(errno.EAGAIN, "another process holds it", str(path)) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        held.release()


def open_regular(path: Path) -> FileIO:
    """Open a regular file for reading, without a buffer. Raises OSError, or ValueError if it is something else."""
    reason = "it is not a regular file"
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened, which some devices take for a request
        raise ValueError(reason)
    file = FileIO(os.open(path, os.O_RDONLY | _BINARY | _PATIENT))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(reason)
    return file


def read_bytes(path: Path, limit: int = LARGEST_JSON) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. Raises OSError, or ValueError with the reason."""
    with BufferedReader(open_regular(path)) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content


def read_json(path: Path, *, limit: int = LARGEST_JSON, strict: bool = True) -> Any:
    """Return the value in a JSON file, as `parse_json` reads it. Raises OSError, or ValueError with the reason."""
    return parse_json(read_bytes(path, limit), strict=strict)


def parse_json(content: bytes, *, strict: bool = True) -> Any:
    """Return the value of a UTF-8 JSON text whose depth and numbers of values are bounded.

    `strict` refuses numbers that are not finite (`NaN`, `1e999`) and keys that stand twice in one object, which
    other readers take for the first or for the last. Raises ValueError with the reason.
    """
    if content.count(b"{") + content.count(b"[") > _MOST_CONTAINERS:
        raise ValueError(f"it has more than {_MOST_CONTAINERS:,} objects and lists")
    if content.count(b'"') > 2 * _MOST_TEXTS or content.count(b",") > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_TEXTS:,} texts or {_MOST_VALUES:,} values")
    try:
        text = content.decode("utf-8")
        hooks: dict[str, Any] = {
            "parse_constant": _finite,
            "parse_float": _finite,
            "object_pairs_hook": _distinct,
        }
        value = json.loads(text, **(hooks if strict else {}))
    except RecursionError as error:
        raise ValueError(f"it is nested more than {_DEEPEST} deep") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        if text.startswith("version https://git-lfs"):
            raise ValueError("it is a pointer of git-lfs, fetch the file with `git lfs pull`") from error
        raise ValueError(f"it is not JSON: {error}") from error
    _require_shallow(value)
    return value


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the object in one of our own files; None if there is no file or, with a warning, if it is damaged."""
    try:
        value = read_json(path)
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("%s", sentence(f"{path} is ignored, it can't be read: {error}"))
        return None


def read_as(kind: type[T], path: Path) -> T | None:
    """Return the dataclass `kind` in one of our own files; None if there is no file or, with a warning, another."""
    record = read_record(path)
    try:
        return None if record is None else parse_record(kind, record)
    except ValueError as error:
        _log.warning("%s", sentence(f"{path} is ignored, it is damaged or of another version: {error}"))
        return None


def parse_record(kind: type[T], value: Any) -> T:
    """Build the dataclass `kind` out of plain JSON, every value checked against the type of its field.

    Raises ValueError that names the first value that is missing or of another type.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error


def plain_record(value: Any) -> dict[str, Any]:
    """Return a dataclass as plain JSON, which `parse_record` reads back: lists for tuples, text for enumerations."""
    return _adapter(value.__class__).dump_python(value, mode="json")


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {text[:20]}, which is not finite")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} stands in it twice")
    return found


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        level = [one for parent in level for one in (parent.values() if isinstance(parent, dict) else parent)]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEEPEST} deep")
