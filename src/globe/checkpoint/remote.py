"""The headers of a hub model without its weights: a folder that a reader takes for the checkpoint, a few MB large."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from globe.checkpoint.hub import Source, explained, is_hub_id, resolve
from globe.checkpoint.shards import INDEX, SINGLE


@contextmanager
def headers_only(path: str | None, *, revision: str | None = None) -> Iterator[Source]:
    """Like `resolve`, but of a hub model that is not in the cache only config.json and headers are fetched.

    The folder then is temporary, and its weights are holes in files of the right length. Raises CheckpointError.
    """
    if path is None or not is_hub_id(path) or _is_cached(path, revision):
        yield resolve(path, revision=revision)
        return
    with TemporaryDirectory(prefix="globe-headers-") as folder:
        commit = _fetch(path, revision, Path(folder))
        yield Source(Path(folder), path, commit)


def _is_cached(hub_id: str, revision: str | None) -> bool:
    """Are the weights here already?"""
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(hub_id, name, revision=revision), str) for name in (SINGLE, INDEX)
    )


def _fetch(hub_id: str, revision: str | None, folder: Path) -> str | None:
    import huggingface_hub

    try:
        config = Path(huggingface_hub.hf_hub_download(hub_id, "config.json", revision=revision))
        found = huggingface_hub.get_safetensors_metadata(hub_id, revision=revision)
    except Exception as error:  # the HTTP library underneath differs between versions
        raise explained(error, hub_id, revision) from error
    shutil.copyfile(config, folder / "config.json")
    for name, file in found.files_metadata.items():
        _write_holes(folder / name, file.tensors)
    if found.sharded:
        (folder / INDEX).write_text(json.dumps({"weight_map": found.weight_map}), encoding="utf-8")
    commit = config.parent.name if config.parent.parent.name == "snapshots" else None
    return commit or revision


def _write_holes(path: Path, tensors: dict[str, Any]) -> None:
    """A safetensors file of these tensors that takes no room: the system stores no zeros."""
    header = json.dumps(
        {
            name: {"dtype": str(one.dtype), "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
            for name, one in tensors.items()
        }
    ).encode()
    end = max((one.data_offsets[1] for one in tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
