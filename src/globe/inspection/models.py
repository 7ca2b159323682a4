"""A checkpoint from its config.json and headers: layers, experts, sizes, and what a bank would keep of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from globe.am.records import Sizes
from globe.checkpoint import Checkpoint, ShardReader
from globe.checkpoint.architecture import FAMILIES
from globe.checkpoint.experts import SHARED
from globe.checkpoint.hub import Source
from globe.checkpoint.model_config import PREFIX, experts_per_token, read_config
from globe.checkpoint.remote import headers_only
from globe.config.choices import Centre
from globe.config.schema import NormaliseConfig
from globe.config.size_expressions import exact_size
from globe.errors import CheckpointError
from globe.files import read_record
from globe.hf.destination import RECORD

EMBEDDED = "embedded"
COMPRESSED = ("up", "gate")
"""The families that banks are learned for."""


def inspect_model(path: str, revision: str | None, *, ms: Sequence[str], rs: Sequence[str]) -> dict[str, Any]:
    """Return everything, as plain JSON; kind is `checkpoint`, or `compact` for factors instead of matrices.

    Reads no weight. Raises CheckpointError if it can't be opened, ConfigError for a size that is not understood.
    """
    try:
        source = headers_only(None if path == EMBEDDED else path, revision=revision)
        compact = str(read_config(source.folder)["model_type"]).startswith(PREFIX)
        return _compact(source) if compact else _checkpoint(Checkpoint(source), ms, rs)
    except CheckpointError as error:  # reading speaks of the options that training has for it
        said = str(error).replace("model.path", "path").replace("model.revision", "revision")
        raise CheckpointError(said) from error


def _checkpoint(checkpoint: Checkpoint, ms: Sequence[str], rs: Sequence[str]) -> dict[str, Any]:
    groups = expert_groups(checkpoint)
    return {
        "kind": "checkpoint",
        "source": checkpoint.source(),
        "model_type": checkpoint.model_type,
        "layers": checkpoint.num_layers,
        "moe_layers": list(checkpoint.moe_layers),
        "experts_per_token": experts_per_token(checkpoint.config),
        "parameters": checkpoint.total_parameters,
        "routed_parameters": sum(group["parameters"] for group in groups),
        "files": len(checkpoint.reader.files),
        "bytes": checkpoint.stored_bytes,
        "dtypes": _dtypes(checkpoint.stored),
        "quantisation": checkpoint.quantisation,
        "experts": groups,
        "shared": shared_expert(checkpoint),
        "predictions": predictions(checkpoint, ms, rs),
        "patched": read_record(checkpoint.folder / RECORD),
    }


def expert_groups(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the routed experts, layers of one shape and dtype together: `n` matrices of p x d in each of `layers`."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for family in FAMILIES:
        for layer in checkpoint.moe_layers:
            if family not in checkpoint.families(layer):
                continue
            shape = checkpoint.shape(layer, family)
            place = checkpoint.locate(layer, family, 0)
            dtype = checkpoint.reader.dtype(place.tensor)
            key = (family, shape.n, shape.p, shape.d, dtype, place.expert is not None)
            found.setdefault(key, []).append(layer)
    groups = []
    for (family, n, p, d, dtype, fused), layers in found.items():
        numbers = len(layers) * n * p * d
        groups.append(
            {
                "family": family,
                "layers": layers,
                "n": n,
                "p": p,
                "d": d,
                "dtype": str(dtype).removeprefix("torch."),
                "fused": fused,
                "tensor": checkpoint.locate(layers[0], family, 0).tensor,
                "parameters": numbers,
                "bytes": numbers * dtype.itemsize,
                "share": numbers / checkpoint.total_parameters,
            }
        )
    return groups


def shared_expert(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the size of the up matrix of the expert that every token uses, and the layers with one; None for none."""
    found: dict[str, Any] | None = None
    for layer in checkpoint.moe_layers:
        try:
            place = checkpoint.locate(layer, "up", SHARED)
        except CheckpointError:
            continue
        if found is None:
            shape = checkpoint.reader.shape(place.tensor)
            rows = (place.rows[1] - place.rows[0] + place.interleaved) // (1 + place.interleaved)
            found = {"p": rows, "d": shape[-2 if place.transposed else -1], "layers": []}
        found["layers"].append(layer)
    return found


def predictions(checkpoint: Checkpoint, ms: Sequence[str], rs: Sequence[str]) -> list[dict[str, Any]]:
    """Return what banks of every (m, r) would keep if up and gate of all layers got one each, centred as by default.

    `kept` is of the compressed families and `kept_model` of the whole model. A size that does not come out whole is
    rounded; `sizes` lists what it came to, once for every shape of experts.
    """
    shapes = Counter(
        (shape.n, shape.p, shape.d)
        for family in COMPRESSED
        for layer in checkpoint.moe_layers
        if family in checkpoint.families(layer)
        for shape in [checkpoint.shape(layer, family)]
    )
    means = 1 if NormaliseConfig().centre is Centre.scalar else 0
    found = []
    for m_text in ms:
        for r_text in rs:
            sizes = []
            kept = dense = 0
            for (n, p, d), count in shapes.items():
                m, m_whole = _nearest("m", m_text, {"n": n}, n)
                r, r_whole = _nearest("r", r_text, {"p": min(p, d), "d": d}, min(p, d))
                sizes.append({"n": n, "p": p, "d": d, "m": m, "r": r, "rounded": not (m_whole and r_whole)})
                kept += count * (Sizes(n, p, d, m, r).parameters + means)
                dense += count * n * p * d
            total = checkpoint.total_parameters
            found.append(
                {
                    "m": m_text,
                    "r": r_text,
                    "sizes": sizes,
                    "kept": kept / dense,
                    "kept_model": (total - dense + kept) / total,
                    "parameters": total - dense + kept,
                }
            )
    return found


def _nearest(key: str, text: str, symbols: dict[str, int], most: int) -> tuple[int, bool]:
    """Return the size a text stands for, rounded to one that is possible, and whether it was one."""
    exact = exact_size(key, text, symbols)
    size = min(max(1, int(exact + 1 / 2)), most)
    return size, exact == size


def _compact(source: Source) -> dict[str, Any]:
    reader = ShardReader(source.folder, source.headers)
    config = read_config(source.folder)
    record = read_record(source.folder / RECORD)
    return {
        "kind": "compact",
        "source": {"id": source.id, "revision": source.revision, "model_type": config["model_type"]},
        "model_type": config["model_type"],
        "parameters": _numbers(reader),
        "files": len(reader.files),
        "bytes": _bytes(reader),
        "dtypes": _dtypes(reader),
        "patched": record,
    }


def _numbers(reader: ShardReader) -> int:
    entries = [reader.entry(name) for name in reader.names]
    return sum(one.nbytes // one.dtype.itemsize for one in entries if one.dtype.is_floating_point)


def _bytes(reader: ShardReader) -> int:
    return sum(reader.entry(name).nbytes for name in reader.names)


def _dtypes(reader: ShardReader) -> dict[str, int]:
    """Return how many numbers are stored in each dtype."""
    counts = Counter[str]()
    for name in reader.names:
        entry = reader.entry(name)
        counts[str(entry.dtype).removeprefix("torch.")] += entry.nbytes // entry.dtype.itemsize
    return dict(counts.most_common())
