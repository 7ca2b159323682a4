"""From what the user typed (a folder, a hub id, nothing) to a folder on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import globe.embedded
from globe.checkpoint.shards import INDEX
from globe.errors import CheckpointError
from globe.files import read_json

EMBEDDED = "embedded"
"""What a user types for the model that comes with the package."""
EMBEDDED_ID = "globe-tiny"
# Weights in other formats, and folders below (`original/`, `onnx/`), which are mostly copies in other formats.
IGNORED = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.npz", "*.tflite",
    "*.ot", "*/*.safetensors", "consolidated*", "original/*", "onnx/*", "metal/*",
)  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint lies and what to call it."""

    folder: Path
    id: str
    """Hub id, folder as typed, or `globe-tiny` for the embedded model."""
    revision: str | None
    """Commit of a hub model, if the cache names it; None for folders."""
    headers: dict[str, dict[str, Any]] | None = None
    """File name -> header of weights that are not here but on the hub; None where they are in `folder`."""


def resolve(path: str | None, *, revision: str | None = None, force_download: bool = False) -> Source:
    """Find the folder of a checkpoint; download it if it is a hub id.

    `None` and "embedded" are the embedded model. A folder wins over a name. Under HF_HUB_OFFLINE only the
    cache is asked. Raises CheckpointError if there is no such folder or model, or no way to get it.
    """
    if path is None or (path == EMBEDDED and not Path(path).is_dir()):
        return Source(globe.embedded.path(), EMBEDDED_ID, None)
    folder = Path(path).expanduser()
    if path.strip() and folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"model.revision={revision!r} is for hub ids, but {path} is a folder: drop it"
            )
        return Source(folder, path, None)
    if folder.is_file():
        raise CheckpointError(f"model.path={path!r} is a file: give the folder that holds it")
    if not is_hub_id(path):
        raise CheckpointError(
            f"model.path={path!r} is neither a folder here nor a hub id (owner/name): correct it"
        )
    return _snapshot(path, revision, force_download)


def is_hub_id(path: str) -> bool:
    """Return whether this has the form of a hub id and is no folder here."""
    return bool(_HUB_ID.fullmatch(path)) and not path.startswith(".") and not Path(path).expanduser().exists()


def _snapshot(hub_id: str, revision: str | None, force_download: bool) -> Source:
    import huggingface_hub
    from huggingface_hub import errors

    def download(**patterns: list[str]) -> str:
        options: dict[str, Any] = {"revision": revision, "force_download": force_download, **patterns}
        return str(huggingface_hub.snapshot_download(hub_id, **options))

    try:
        found = download(ignore_patterns=list(IGNORED))
        if below := _shards_below(Path(found)):
            found = download(allow_patterns=below)
    except errors.LocalEntryNotFoundError as error:
        # Whatever else the hub's cache lacks, the reader itself checks for the tensors.
        found = str(getattr(error, "snapshot_path", ""))
        if not found:
            raise explained(error, hub_id, revision) from error
    except Exception as error:  # the HTTP library underneath differs between versions
        raise explained(error, hub_id, revision) from error
    folder = Path(found)
    commit = folder.name if folder.parent.name == "snapshots" else revision
    return Source(folder, hub_id, commit)


def _shards_below(folder: Path) -> list[str]:
    """Return the shards that an index names in folders below, which are not downloaded for their place alone."""
    try:
        index = read_json(folder / INDEX)["weight_map"]
        return sorted({shard for shard in index.values() if "/" in shard and not (folder / shard).exists()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []  # whoever reads the index says what is wrong


def explained(error: Exception, hub_id: str, revision: str | None) -> CheckpointError:
    """Return the sentence for whatever huggingface_hub raised."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            text = (
                f"model.path={hub_id!r} is gated: accept its terms on the hub and log in with `hf auth login`"
            )
        case errors.RepositoryNotFoundError():
            text = f"model.path={hub_id!r} is neither a folder here nor a model on the hub open to you: correct it"
        case errors.RevisionNotFoundError():
            text = (
                f"model.revision={revision!r} does not exist for {hub_id}: give a branch, tag or commit of it"
            )
        case errors.LocalEntryNotFoundError() if revision is not None and _is_cached(hub_id):
            text = (
                f"model.revision={revision!r} of {hub_id} is not in the hub cache, where another one is, and the hub "
                "is out of reach or HF_HUB_OFFLINE is set: download it once while online, or correct it"
            )
        case errors.LocalEntryNotFoundError():
            text = (
                f"model.path={hub_id!r} is neither a folder here nor in the hub cache, and the hub is out of "
                "reach or HF_HUB_OFFLINE is set: download it once while online, or give a folder"
            )
        case _:
            text = (
                f"model.path={hub_id!r} could not be downloaded ({type(error).__name__}: {_first_line(error)}): "
                "try again, or give a folder"
            )
    return CheckpointError(text)


def _is_cached(hub_id: str) -> bool:
    """Return whether any revision of a hub model is in the cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
