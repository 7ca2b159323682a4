"""What a checkpoint's `config.json` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from globe.errors import CheckpointError, GlobeError
from globe.files import read_json

PREFIX = "globe_"
"""What the model_type of a compact checkpoint has in front of the original's."""

_PER_TOKEN = (
    *("num_experts_per_tok", "moe_topk", "top_k_experts", "num_experts_per_token", "experts_per_token"),
    "moe_k",
)
_LARGEST = 16 << 20
"""Bytes of the largest config.json that is read."""
_QUANTISED = (
    "_blocks", "_scales", "_scale", "_scale_inv", ".qweight", ".qzeros", ".weight_packed", ".absmax", ".quant_state"
)  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` of a checkpoint. Raises CheckpointError if missing, malformed or without model_type."""
    path = folder / "config.json"
    if not path.exists():
        inner = next((one.parent for one in sorted(folder.glob("*/config.json"))), None)
        meant = (
            f"its folder {inner.name}, which has one" if inner else "the folder of a Hugging Face checkpoint"
        )
        raise CheckpointError(f"{folder} has no config.json: give {meant}")
    try:
        config = read_json(path, limit=_LARGEST, strict=False)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): save or download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{path} names no model_type: give a Hugging Face checkpoint of a language model"
        )
    return config


def is_compact(config: Mapping[str, Any]) -> bool:
    """Return whether this is the configuration of a compact GloBE checkpoint."""
    described = [part.get("quantization_config") for part in parts_of(config)]
    ours = any(isinstance(one, dict) and one.get("quant_method") == "globe" for one in described)
    return str(config["model_type"]).startswith(PREFIX) or ours


def experts_per_token(config: Mapping[str, Any]) -> int | None:
    """Return how many routed experts a token goes to, by whichever name the architecture has for it."""
    found = (part.get(name) for part in parts_of(config) for name in _PER_TOKEN)
    return next((count for count in found if isinstance(count, int) and count > 0), None)


def refuse_compact(config: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError for a compact GloBE checkpoint."""
    if is_compact(config):
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


def is_quantised(name: str) -> bool:
    """Return whether this names a tensor of a quantised matrix or of its scales."""
    return name.endswith(_QUANTISED)


def parts_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the configuration, and that of the language model in it."""
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]


def size_of(config: dict[str, Any], keys: tuple[str, ...], layer: int | None = None) -> int | None:
    """Return the integer under the first dotted key that has one (of a list the layer's); None if none has."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, list):
            value = value[layer] if layer is not None and layer < len(value) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


@contextmanager
def understood(path: str | Path, doing: str = "load") -> Iterator[None]:
    """Turn what transformers raises when it is `doing` something with a foreign checkpoint into one sentence.

    Raises CheckpointError; memory that ran out stays what it was.
    """
    try:
        yield
    except (GlobeError, MemoryError, BrokenPipeError):
        raise
    except Exception as error:  # of every kind, by what in the files is not as expected
        said = " ".join(str(error).split()) or "no reason given"
        if "allocate" in said:  # memory, not the files
            raise
        if isinstance(error, OSError) and not Path(path).expanduser().is_dir():
            raise CheckpointError(
                f"{str(path)!r} is neither a checkpoint folder nor a model on the hub that can be had: correct it"
            ) from error
        raise CheckpointError(
            f"transformers can't {doing} {path} ({type(error).__name__}: {said[:120]}): correct its config.json, or "
            "save or download the checkpoint again"
        ) from error
