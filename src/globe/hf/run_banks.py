"""The banks of a run folder, checked against the checkpoint they were learned from."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from globe.bank.compose import rebuild
from globe.bank.file import BankArtefact, Member, read_artefact
from globe.checkpoint import Checkpoint, open_checkpoint
from globe.checkpoint.hub import EMBEDDED_ID
from globe.errors import ArtefactError, CheckpointError
from globe.hf.layout import BankLayout, layout_of
from globe.runs.folder import RunFolder, State
from globe.runs.summary import read_summary

SOURCE_HASH = "sha256"
"""Key of an artefact's `source` that holds the hash of the tensors the bank was learned from."""
RECORD_FILE = "globe.json"


@dataclass(frozen=True, slots=True)
class BankEntry:
    """What is known of a bank without its tensors."""

    folder: Path
    members: tuple[Member, ...]
    layout: BankLayout
    source: dict[str, object]
    kept_parameters: int
    family_parameters: int
    kept_bytes: int
    config: dict[str, Any]
    """options of the fit, as the bank records them"""
    relfrob: str
    """the headline figure for people: four digits, or a dash where the bank records none"""

    @property
    def key(self) -> str:
        return self.folder.name

    def read(self) -> BankArtefact:
        """Return the tensors; the hash was verified when the run was opened."""
        return read_artefact(self.folder, verify_hash=False)


def open_run(folder: str | Path) -> tuple[BankEntry, ...]:
    """Return every finished bank of a run folder (`banks/KEY/`), or the one bank if `folder` is itself an artefact.

    Reads and verifies each bank, one at a time. Raises ArtefactError if there is none, if one can't be used,
    or if two of them stand for the same layer and family.
    """
    root = Path(folder)
    single = (root / RECORD_FILE).is_file()
    folders = [root] if single else sorted(path.parent for path in (root / "banks").glob(f"*/{RECORD_FILE}"))
    folders = [one for one in folders if not one.name.startswith(".") and one.suffix != ".partial"]
    if not folders:
        raise ArtefactError(
            f"run={str(folder)!r} holds no finished bank (banks/*/{RECORD_FILE}): give the folder of a run "
            "of globe.train"
        )
    if not single:
        _require_finished(root, folders)
    entries = tuple(_entry(one) for one in folders)
    owner: dict[tuple[int, str], str] = {}
    for entry in entries:
        for member in entry.members:
            place = (member.layer, member.family)
            if place in owner:
                raise ArtefactError(
                    f"{entry.folder} and {owner[place]} both stand for layer {member.layer} {member.family}: "
                    "keep one of the two"
                )
            owner[place] = str(entry.folder)
    return entries


def _require_finished(root: Path, folders: list[Path]) -> None:
    """Raise ArtefactError if a bank that the run says it finished is gone: without it another model would come out."""
    status = RunFolder(root).status
    held = {folder.name for folder in folders}
    for key, bank in ({} if status is None else status.banks).items():
        if bank.state is State.finished and key not in held:
            raise ArtefactError(
                f"{root} finished the bank {key}, and banks/{key} is gone or has no readable {RECORD_FILE}: learn it "
                "anew by the same globe.train command, or give the folders of single banks as run"
            )


def _entry(folder: Path) -> BankEntry:
    artefact = read_artefact(folder)
    return BankEntry(
        folder=folder,
        members=artefact.members,
        layout=layout_of(artefact),
        source=dict(artefact.source or {}),
        kept_parameters=artefact.kept_parameters,
        family_parameters=artefact.family_parameters,
        kept_bytes=artefact.nbytes,
        config=dict(artefact.config or {}),
        relfrob=f"{error:.4f}"
        if isinstance(error := (artefact.metrics or {}).get("relfrob"), float)
        else "-",
    )


def run_of(folder: str | Path) -> Path:
    """Return the folder of a run, for its own or that of one of its banks."""
    root = Path(folder).expanduser()
    return root.parent.parent if (root / RECORD_FILE).is_file() else root


def recorded_cache(folder: str | Path) -> int | str:
    """Return `S_cache` of the run in a folder, or that the one bank in it belongs to; "all" where none is recorded."""
    summary = read_summary(RunFolder(run_of(folder)).summary_file)
    return "all" if summary is None else summary.S_cache


def open_source(
    entries: tuple[BankEntry, ...], path: str | None = None, *, revision: str | None = None
) -> Checkpoint:
    """Return the checkpoint at `path`, or (None) the one the first bank says it was learned from.

    Raises CheckpointError naming `model.path` if it can't be opened, ArtefactError if no source is recorded.
    """
    if path is not None:
        return open_checkpoint(path, revision=revision)
    source = entries[0].source
    if not isinstance(source.get("id"), str):
        raise ArtefactError(f"{entries[0].folder} does not say what it was learned from: give model.path")
    if source["id"] == EMBEDDED_ID:
        return open_checkpoint(None)
    recorded = source.get("revision")
    return open_checkpoint(str(source["id"]), revision=revision or (str(recorded) if recorded else None))


def verify_source(entries: tuple[BankEntry, ...], checkpoint: Checkpoint) -> None:
    """Check that every bank was learned from this checkpoint: model type, sizes, and the hash of its tensors.

    Streams the bytes of the tensors concerned once. Raises ArtefactError naming the bank and the remedy.
    """
    remedy = "give the checkpoint it was learned from as model.path"
    for entry in entries:
        made_for = entry.source.get("model_type")
        if made_for != checkpoint.model_type:
            raise ArtefactError(
                f"{entry.folder} was learned from a {made_for} and {checkpoint.folder} is a "
                f"{checkpoint.model_type}: {remedy}"
            )
        names = []
        for member in entry.members:
            try:
                shape = checkpoint.shape(member.layer, member.family)
                names += [checkpoint.locate(member.layer, member.family, e).tensor for e in member.experts]
            except CheckpointError as error:
                raise ArtefactError(
                    f"{entry.folder} does not fit {checkpoint.folder} ({error}): {remedy}"
                ) from error
            if (shape.p, shape.d) != (entry.layout.p, entry.layout.d):
                raise ArtefactError(
                    f"{entry.folder} is for experts of {entry.layout.p} x {entry.layout.d} and "
                    f"{checkpoint.folder} has {shape.p} x {shape.d}: {remedy}"
                )
        recorded = entry.source.get(SOURCE_HASH)
        if recorded is None:
            raise ArtefactError(
                f"{entry.folder} does not say which tensors it was learned from: train it again"
            )
        if recorded != checkpoint.hash_tensors(names):
            raise ArtefactError(
                f"{entry.folder} was learned from other weights than those in {checkpoint.folder}: {remedy}"
            )


class DenseExperts:
    """The dense matrices of a run's experts. The last two members stay: gate and up of a layer alternate.

    So does the last artefact, which may serve many layers.
    """

    def __init__(self) -> None:
        self._read = functools.lru_cache(maxsize=1)(functools.partial(read_artefact, verify_hash=False))
        self._rebuilt = functools.lru_cache(maxsize=2)(self._rebuild)

    def __call__(self, entry: BankEntry, position: int, row: int, dtype: torch.dtype) -> Float[Tensor, "p d"]:
        """Return expert `row`, counted from the first of the member at `position`, computed wide, rounded once."""
        member = entry.members[position]
        return self._rebuilt(entry.folder, member.start, member.stop, dtype)[row]

    def _rebuild(self, folder: Path, start: int, stop: int, dtype: torch.dtype) -> Float[Tensor, "h p d"]:
        return rebuild(self._read(folder), range(start, stop), dtype=dtype)
