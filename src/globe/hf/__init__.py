"""Compressed models inside Hugging Face transformers: the factored experts, and the three ways to use them.

Nothing here imports transformers until a model is loaded, patched or written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from globe.hf.loading import load
    from globe.hf.patching import patch_model

__all__ = ["load", "patch_model"]

_HOME = {"load": "globe.hf.loading", "patch_model": "globe.hf.patching"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
