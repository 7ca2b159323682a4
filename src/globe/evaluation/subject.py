"""What is evaluated: from what the user typed to a model in memory, and what is known of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from globe.calibration.experts_module import experts_modules
from globe.calibration.run import recorded_passages
from globe.calibration.text import has_tokenizer, read_tokenizer
from globe.checkpoint import Checkpoint, ShardReader
from globe.checkpoint.hub import EMBEDDED_ID, resolve
from globe.checkpoint.model_config import PREFIX, read_config
from globe.errors import ArtefactError, CheckpointError, ConfigError
from globe.files import read_record, sha256
from globe.hf.destination import RECORD
from globe.hf.loading import load
from globe.hf.patching import patch_model
from globe.hf.run_banks import RECORD_FILE, SOURCE_HASH, BankEntry, open_run, run_of, verify_source
from globe.hf.swap import SHARED_BANKS

EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A checkpoint, or a run and the checkpoint it is patched into; no weights are in memory yet."""

    name: str
    """as it was typed"""
    folder: Path
    """of the checkpoint"""
    checkpoint: Checkpoint | None
    """None for a compact checkpoint, which holds factors instead of matrices"""
    run: Path | None = None
    entries: tuple[BankEntry, ...] = ()
    """banks of the run"""
    record: dict[str, Any] | None = None
    """what `globe.patch` wrote beside the checkpoint"""

    @property
    def reader(self) -> ShardReader:
        """The tensors of the checkpoint, by name."""
        return ShardReader(self.folder) if self.checkpoint is None else self.checkpoint.reader

    @property
    def sources(self) -> tuple[dict[str, Any], ...]:
        """Sources that the banks say they were learned from, id and revision; nothing for an ordinary checkpoint."""
        if self.entries:
            return tuple(entry.source for entry in self.entries)
        return () if self.record is None else (self.record["source"],)

    @property
    def calibration_passages(self) -> frozenset[int] | None:
        """Passages of the text that the model was calibrated on; None where none is recorded."""
        return recorded_passages(self.folder if self.run is None else run_of(self.run))

    @property
    def source_hashes(self) -> list[Any]:
        """Hashes of the tensors that the banks say they were learned from."""
        return [source.get(SOURCE_HASH) for source in self.sources]

    @property
    def bank_hashes(self) -> dict[str, str]:
        """Hash of each bank of a run; nothing for a checkpoint."""
        return {entry.key: sha256(entry.folder / RECORD_FILE) for entry in self.entries}

    def load(self, *, dtype: torch.dtype | None, device: torch.device, S_cache: int | str | None) -> Any:
        """Return the language model in evaluation mode on `device`; `dtype` None keeps that of the files."""
        kwargs: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if self.run is None:
            return load(self.folder, S_cache=S_cache, **kwargs).to(device)
        if self.checkpoint is not None and self.checkpoint.dense_only:
            raise CheckpointError(
                f"{self.checkpoint.dense_only}: write it with globe.patch run={self.run} format=dense and evaluate that"
            )
        model = load(self.folder, **kwargs)
        return patch_model(model, self.run, S_cache=S_cache).to(device)


def open_subject(model: str, against: str) -> tuple[Subject, Subject | None]:
    """Return the model and the original it is compared with, None for `against=none`.

    `model` is a checkpoint folder, a hub id, `embedded`, or the folder of a run, which is patched into the
    original. `against` is a checkpoint likewise, `none`, or `auto`: what the model was made from if that is
    recorded, otherwise `none`. Raises ConfigError, CheckpointError or ArtefactError with one sentence.
    """
    root = Path(model).expanduser()
    if (root / RECORD_FILE).is_file() or (root / "banks").is_dir():
        return _open_run(model, root, against)
    subject = _open_checkpoint("model", model)
    if against == "none" or (against == "auto" and not subject.sources):
        return subject, None
    return subject, _open_original(against, subject.sources)


def _open_run(model: str, root: Path, against: str) -> tuple[Subject, Subject | None]:
    entries = open_run(root)
    sources = tuple(entry.source for entry in entries)
    original = _open_original("auto" if against == "none" else against, sources)
    assert original.checkpoint is not None
    try:
        verify_source(entries, original.checkpoint)
    except ArtefactError as error:  # patching speaks of the option that it has for it
        raise ArtefactError(str(error).replace("model.path", "against")) from error
    subject = Subject(model, original.folder, original.checkpoint, root, entries)
    return subject, None if against == "none" else original


def _open_original(against: str, sources: tuple[dict[str, Any], ...]) -> Subject:
    if against != "auto":
        original = _open_checkpoint("against", against)
    else:
        recorded = str(sources[0].get("id"))
        name = EMBEDDED if recorded == EMBEDDED_ID else recorded
        try:
            original = _open_checkpoint("against", name, revision=sources[0].get("revision"))
        except CheckpointError as error:
            raise CheckpointError(
                f"the model was made from {recorded}, which can't be opened here: give its folder as against, "
                "or against=none"
            ) from error
    if original.checkpoint is None:
        raise ConfigError(f"against={against!r} is a compact checkpoint: give the original it was made from")
    return original


def _open_checkpoint(key: str, path: str, *, revision: str | None = None) -> Subject:
    try:
        source = resolve(None if path == EMBEDDED else path, revision=revision)
        compact = str(read_config(source.folder)["model_type"]).startswith(PREFIX)
        checkpoint = None if compact else Checkpoint(source)
    except CheckpointError as error:  # reading speaks of the option that training has for it
        raise CheckpointError(str(error).replace("model.path", key)) from error
    record = read_record(source.folder / RECORD)
    return Subject(path, source.folder, checkpoint, record=record)


def load_tokenizer(subject: Subject, original: Subject | None, given: str | None) -> Any:
    """Return the tokenizer in the folder `given`, or else that of the original, or else that of the model.

    Raises ConfigError if there is none, if it can't be loaded, or if the two differ in their vocabularies.
    """
    if given is not None:
        folders = [Path(given).expanduser()]
    else:
        folders = [one.folder for one in (original, subject) if one is not None]
    found = [read_tokenizer(folder) for folder in dict.fromkeys(folders) if has_tokenizer(folder)]
    if not found:
        named = " or ".join(str(folder) for folder in dict.fromkeys(folders))
        raise ConfigError(f"{named} has no tokenizer: give the folder of one as tokenizer")
    if len(found) == 2 and found[0].get_vocab() != found[1].get_vocab():
        raise ConfigError(
            f"{folders[1]} and {folders[0]} have different vocabularies: compare a model with the one it was "
            "made from, or give against=none"
        )
    return found[0]


def check_model(model: Any, highest: int, window: int, *, original: Any | None) -> None:
    """Check that the models can be given these tokens. Raises ConfigError.

    `highest` is the largest token number of the text.
    """
    config = model.config.get_text_config()
    if original is not None and (other := original.config.get_text_config().vocab_size) != config.vocab_size:
        raise ConfigError(
            f"the model has a vocabulary of {config.vocab_size} and the original one of {other}: compare a model "
            "with the one it was made from, or give against=none"
        )
    if highest >= config.vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {highest} and the model has {config.vocab_size}: give the folder of its "
            "own as tokenizer"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise ConfigError(
            f"window={window} is more than the {positions} positions of the model: give at most that"
        )


def same_skeleton(model: nn.Module, original: nn.Module) -> bool:
    """Return whether the two differ at most in their routed experts: only then layers can be compared one by one."""
    return _skeleton(model) == _skeleton(original)


def _skeleton(model: nn.Module) -> dict[str, tuple[int, ...]]:
    experts = tuple(f"{name}." for name in experts_modules(model).values())
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not name.startswith((*experts, f"{SHARED_BANKS}."))
    }
