"""The file format of a learned bank: a folder with `bank.safetensors` and `globe.json` that describes it.

A reader checks everything before use and refuses with one sentence; a writer makes the whole folder appear,
or nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, fields
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from globe.bank.packed_tensors import dequantised, flatten, gather, has_coded, layouts
from globe.bank.record import TENSOR_NAMES, BankArtefact, Member, require, validate
from globe.errors import ArtefactError
from globe.files import (
    fresh_folder,
    open_regular,
    parse_json,
    parse_record,
    plain_record,
    read_json,
    sha256,
    sync,
    write_text,
)

FORMAT_VERSION = 2
"""Version 2 added packed factors; files of version 1 have none and are read as they are."""
CODED_VERSION = 3
"""Version of files with coded adapters, which programs that know only version 2 refuse."""
_READ = (1, FORMAT_VERSION, CODED_VERSION)
TENSORS_FILE = "bank.safetensors"
RECORD_FILE = "globe.json"
_LONGEST_HEADER = 8 << 20
"""Bytes; the members of a bank of 10,000 experts take a hundredth of it."""
METADATA_KEY = "globe"
"""The only metadata key: two or more come out in random order, and equal runs would give unequal bytes."""


@dataclass(frozen=True, slots=True)
class _Record:
    """What `globe.json` says of the tensors; names as in `BankArtefact`."""

    members: tuple[Member, ...]
    activation: str
    lam: float
    source: dict[str, Any]
    seed: int
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


def write_artefact(artefact: BankArtefact, folder: str | os.PathLike[str]) -> None:
    """Write `folder/bank.safetensors` and `folder/globe.json`; the whole folder appears, or nothing does.

    It takes the place of an earlier artefact, see `globe.files.fresh_folder`. Equal tensors, members and source give
    equal bytes of `bank.safetensors`: times and metrics stand in `globe.json`.

    Raises ArtefactError when the artefact is not valid, when its records are not plain JSON with finite
    numbers, when `folder` is something else than an artefact, or when the disk refuses.
    """
    target = Path(folder).absolute()
    validate(artefact, "the artefact to be written")
    if os.path.lexists(target) and not _replaceable(target):
        raise ArtefactError(
            f"{target} exists and is not a GloBE artefact: give another folder or remove this one"
        )
    try:
        with fresh_folder(target) as fresh:
            _write_files(artefact, fresh)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{target} can't be written ({error}): free space or give another folder"
        ) from error


def _replaceable(target: Path) -> bool:
    return (
        target.is_dir()
        and not target.is_symlink()
        and {entry.name for entry in target.iterdir()} <= {TENSORS_FILE, RECORD_FILE}
    )


def _write_files(artefact: BankArtefact, folder: Path) -> None:
    tensors, storages = {}, set()
    plain = {name: tensor for name, tensor in artefact.tensors().items() if name not in artefact.packed}
    for name, tensor in (plain | flatten(artefact.packed)).items():
        whole = tensor.detach().cpu().contiguous()
        storage = whole.untyped_storage().data_ptr()
        # safetensors refuses two tensors that share memory, as two slices of one batch do
        tensors[name] = whole.clone() if storage in storages else whole
        storages.add(storage)
    try:
        header = json.dumps(_identity(artefact), sort_keys=True, allow_nan=False)
        save_file(tensors, folder / TENSORS_FILE, metadata={METADATA_KEY: header})
        record = _identity(artefact) | {
            "config": artefact.config or {},
            "metrics": artefact.metrics or {},
            "kept_parameters": artefact.kept_parameters,
            "kept_bytes": artefact.nbytes,
            "family_parameters": artefact.family_parameters,
            "sha256": sha256(folder / TENSORS_FILE),
        }
        text = json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ArtefactError(
            f"the artefact's source, config or metrics are not plain JSON: {error}"
        ) from error
    write_text(folder / RECORD_FILE, text)
    # safetensors makes its file readable by the owner alone, whatever the umask says
    shutil.copymode(folder / RECORD_FILE, folder / TENSORS_FILE)
    sync(folder / TENSORS_FILE)


def _identity(artefact: BankArtefact) -> dict[str, Any]:
    """Return what the tensors mean, without anything that two equal runs could differ in."""
    return {
        "format_version": CODED_VERSION if has_coded(artefact.packed) else FORMAT_VERSION,
        "members": [plain_record(member) for member in artefact.members],
        "sizes": _sizes(artefact),
        "activation": artefact.activation,
        "lam": artefact.lam,
        "seed": artefact.seed,
        "source": artefact.source or {},
        "packed": layouts(artefact.packed),
    }


def _sizes(artefact: BankArtefact) -> dict[str, int | None]:
    return {name: getattr(artefact, name) for name in ("n", "p", "d", "m", "r", "atom_rank")}


def read_artefact(folder: str | os.PathLike[str], *, verify_hash: bool = True) -> BankArtefact:
    """Read and check an artefact; tensors come on the CPU in the dtypes they were written in, packed factors in that
    of the codes.

    `verify_hash` compares the SHA-256 of `bank.safetensors` with the one in `globe.json`, which reads the
    file once more. Raises ArtefactError when a file is missing, truncated, foreign, changed, of another
    format version, or when `validate` finds the tensors unusable.
    """
    root = Path(folder)
    record = _read_record(root)
    where = str(root)
    if verify_hash and _digest(root / TENSORS_FILE) != record.get("sha256"):
        raise ArtefactError(
            f"{root / TENSORS_FILE} is not the file {RECORD_FILE} was written for: copy both again"
        )
    tensors, header = _read_tensors(root / TENSORS_FILE)
    for key in ("format_version", "members", "sizes", "activation", "lam", "seed", "source"):
        require(key in record, where, f"{RECORD_FILE} has no {key!r}")
        require(record[key] == header.get(key), where, f"{RECORD_FILE} and {TENSORS_FILE} differ in {key!r}")
    described = record.get("packed", {})
    require(described == header.get("packed", {}), where, "its two files differ in 'packed'")
    tensors, packed = gather(tensors, described, where)
    if "codes" in tensors and tensors["codes"].is_floating_point():
        require(not set(packed) & set(tensors), where, "a factor is there twice, packed and not")
        tensors |= dequantised(packed, tensors["codes"].dtype)
    require(
        "codes" in tensors and "adapters" in tensors, where, f"{TENSORS_FILE} lacks 'codes' or 'adapters'"
    )
    unknown = sorted(set(tensors) - set(TENSOR_NAMES))
    require(not unknown, where, f"{TENSORS_FILE} holds unknown tensors {unknown}")
    try:
        known = parse_record(_Record, record)
    except ValueError as error:
        raise ArtefactError(f"{root / RECORD_FILE} is damaged ({error}): export the run again") from error
    meant = {one.name: getattr(known, one.name) for one in fields(_Record)}
    artefact = BankArtefact(**{**meant, **tensors}, packed=packed)
    validate(artefact, where)
    require(
        record["sizes"] == _sizes(artefact), where, f"the sizes in {RECORD_FILE} are not those of the tensors"
    )
    return artefact


def is_intact(folder: str | os.PathLike[str]) -> bool:
    """Return whether both files are there, and the tensor file is, by its SHA-256, the one of the record."""
    root = Path(folder)
    try:
        return _digest(root / TENSORS_FILE) == _read_record(root).get("sha256")
    except ArtefactError:
        return False


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ArtefactError:
    reason = getattr(error, "strerror", None) or error
    return ArtefactError(
        f"{path} can't be read ({reason}): give the folder of a GloBE artefact, or export the run again"
    )


def _read_record(root: Path) -> dict[str, Any]:
    path = root / RECORD_FILE
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(record, dict) or "format_version" not in record:
        raise ArtefactError(f"{path} is not the record of a GloBE artefact: give the folder of one")
    version = record["format_version"]
    if type(version) is not int or version not in _READ:
        raise ArtefactError(
            f"{path} has format version {version!r} where {CODED_VERSION} and earlier are read: export the run again"
        )
    return record


def _require_small_header(path: Path) -> None:
    """Raise ValueError for what the library would not bear: a pipe, a device, a header of millions of tensors."""
    with BufferedReader(open_regular(path)) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"its header has {length:,} bytes where at most {_LONGEST_HEADER:,} are read")
        parse_json(file.read(length))


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        _require_small_header(path)
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {}).get(METADATA_KEY, "null").encode())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtefactError(
            f"{path} can't be read ({error}): the file is missing, truncated or foreign"
        ) from error
    if not isinstance(header, dict):
        raise ArtefactError(f"{path} has no {METADATA_KEY!r} metadata: it was not written by GloBE")
    return tensors, header
