"""Reading and writing checkpoints: which tensors are experts, and their bytes."""

from globe.checkpoint.architecture import Architecture, known_model_types, load_architecture
from globe.checkpoint.experts import (
    Checkpoint,
    Experts,
    ExpertShape,
    extract_expert_weights,
    open_checkpoint,
)
from globe.checkpoint.location import Location
from globe.checkpoint.rewrite import copy_checkpoint, copy_support_files
from globe.checkpoint.shards import ShardReader, ShardWriter

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
