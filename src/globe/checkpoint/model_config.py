"""What a checkpoint's `config.json` says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from globe.errors import CheckpointError
from globe.files import read_json

if TYPE_CHECKING:  # it loads torch, and the names below are needed without
    from globe.checkpoint.shards import ShardReader

PREFIX = "globe_"
"""What the model_type of a compact checkpoint has in front of the original's."""

_LARGEST = 16 << 20
"""Bytes of the largest config.json that is read."""
_QUANTISED = (
    "_blocks", "_scales", "_scale", "_scale_inv", ".qweight", ".qzeros", ".weight_packed", ".absmax", ".quant_state"
)  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` of a checkpoint. Raises CheckpointError if missing, malformed or without model_type."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
    try:
        config = read_json(path, limit=_LARGEST, strict=False)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): save or download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{path} names no model_type: give a Hugging Face checkpoint of a language model"
        )
    return config


def refuse_compact(config: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError for a compact GloBE checkpoint."""
    described = [part.get("quantization_config") for part in _parts(config)]
    ours = any(isinstance(one, dict) and one.get("quant_method") == "globe" for one in described)
    if str(config["model_type"]).startswith(PREFIX) or ours:
        raise CheckpointError(
            f"{folder} is compressed by GloBE already: give the original checkpoint, or write this one as a dense one "
            f"first, globe.load(THIS, dequantize=True).save_pretrained(FOLDER)"
        )


def refuse_other_weights(config: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError where transformers would load other weights than those of the usual names."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), which transformers adds to the model: merge or "
            "remove it"
        )
    named = config.get("transformers_weights")
    if named is not None:
        raise CheckpointError(
            f"{folder}/config.json sends transformers to the weights {named!r} by transformers_weights: rename them to "
            "model.safetensors and remove the key"
        )


def refuse_quantised(config: dict[str, Any], folder: Path, reader: ShardReader) -> None:
    """Raise CheckpointError if the config declares quantised weights."""
    for part in _parts(config):
        record = part.get("quantization_config")
        if record is None:
            continue
        method = record.get("quant_method", "unknown") if isinstance(record, dict) else "unknown"
        entries = ((name, reader.dtype(name)) for name in reader.names)
        if all(
            dtype.is_floating_point and dtype.itemsize > 1 and not is_quantised(name)
            for name, dtype in entries
        ):
            raise CheckpointError(
                f"{folder}/config.json says that the weights are quantised with {method!r}, but they are not: remove "
                "its key quantization_config"
            )
        raise CheckpointError(
            f"{folder} holds weights quantised with {method!r}, which GloBE does not read: convert it to "
            "bfloat16 first (transformers can dequantise while loading)"
        )


def is_quantised(name: str) -> bool:
    """Is this the name of a tensor of a quantised matrix, or of its scales?"""
    return name.endswith(_QUANTISED)


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the configuration, and that of the language model in it."""
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]


def size_of(config: dict[str, Any], keys: tuple[str, ...], layer: int | None = None) -> int | None:
    """The integer under the first of these dotted keys that has one (of a list the layer's); None if none has."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, list):
            value = value[layer] if layer is not None and layer < len(value) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
