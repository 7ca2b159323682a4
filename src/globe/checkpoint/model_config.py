"""What a checkpoint's `config.json` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from globe.errors import CheckpointError

PREFIX = "globe_"
"""What the model_type of a compact checkpoint has in front of the original's."""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint. Raises CheckpointError if missing, malformed or without model_type."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{path} names no model_type: give a Hugging Face checkpoint of a language model"
        )
    return config


def refuse_quantised(config: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError if the config declares quantised weights, or a compact GloBE checkpoint."""
    if str(config["model_type"]).startswith(PREFIX):
        raise _compressed(folder)
    for part in (config, config.get("text_config")):
        record = part.get("quantization_config") if isinstance(part, dict) else None
        if record is None:
            continue
        method = record.get("quant_method", "unknown") if isinstance(record, dict) else "unknown"
        if method == "globe":
            raise _compressed(folder)
        raise CheckpointError(
            f"{folder} holds weights quantised with {method!r}, which GloBE does not read: convert it to "
            "bfloat16 first (transformers can dequantise while loading)"
        )


def _compressed(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is compressed by GloBE already: give the original checkpoint, or write this one as a dense one "
        f"first, globe.load({str(folder)!r}, dequantize=True).save_pretrained(FOLDER)"
    )


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
