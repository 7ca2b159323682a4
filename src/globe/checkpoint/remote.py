"""The headers of a hub model without its weights, a few MB of a model of many GB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from globe.checkpoint.hub import Source, explained, is_hub_id, resolve
from globe.checkpoint.shards import INDEX, SINGLE


def headers_only(path: str | None, *, revision: str | None = None) -> Source:
    """Do as `resolve` does, but of a hub model that is not in the cache only config.json and headers are fetched.

    Names, shapes and dtypes of such a source can be asked for, and none of its weights. Raises CheckpointError.
    """
    if path is None or not is_hub_id(path) or _is_cached(path, revision):
        return resolve(path, revision=revision)
    return _fetch(path, revision)


def _is_cached(hub_id: str, revision: str | None) -> bool:
    """Return whether the weights are here already."""
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(hub_id, name, revision=revision), str) for name in (SINGLE, INDEX)
    )


def _fetch(hub_id: str, revision: str | None) -> Source:
    import huggingface_hub

    try:
        config = Path(huggingface_hub.hf_hub_download(hub_id, "config.json", revision=revision))
        found = huggingface_hub.get_safetensors_metadata(hub_id, revision=revision)
    except Exception as error:  # the HTTP library underneath differs between versions
        raise explained(error, hub_id, revision) from error
    commit = config.parent.name if config.parent.parent.name == "snapshots" else None
    headers = {name: _header(file.tensors) for name, file in found.files_metadata.items()}
    return Source(config.parent, hub_id, commit or revision, headers)


def _header(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return a header as it stands in the file."""
    return {
        name: {"dtype": str(one.dtype), "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
        for name, one in tensors.items()
    }
