"""Experts out of and into Hugging Face checkpoints: which tensors are experts, and their bytes.

The names below are imported when they are first used, so that reading a `config.json` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from globe.checkpoint.architecture import Architecture, known_model_types, load_architecture
    from globe.checkpoint.experts import (
        Checkpoint,
        Experts,
        ExpertShape,
        extract_expert_weights,
        open_checkpoint,
    )
    from globe.checkpoint.location import Location
    from globe.checkpoint.rewrite import copy_checkpoint
    from globe.checkpoint.shards import ShardReader, ShardWriter
    from globe.checkpoint.support import copy_support_files

_HOME = {
    "Architecture": "architecture",
    "known_model_types": "architecture",
    "load_architecture": "architecture",
    "Checkpoint": "experts",
    "Experts": "experts",
    "ExpertShape": "experts",
    "extract_expert_weights": "experts",
    "open_checkpoint": "experts",
    "Location": "location",
    "copy_checkpoint": "rewrite",
    "copy_support_files": "support",
    "ShardReader": "shards",
    "ShardWriter": "shards",
}

__all__ = [
    "Architecture",
    "Checkpoint",
    "ExpertShape",
    "Experts",
    "Location",
    "ShardReader",
    "ShardWriter",
    "copy_checkpoint",
    "copy_support_files",
    "extract_expert_weights",
    "known_model_types",
    "load_architecture",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
