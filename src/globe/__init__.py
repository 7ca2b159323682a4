"""GloBE: compress Mixture-of-Experts language models by learning one global basis bank for their experts.

Importing the package loads nothing heavy; the public names below are imported when they are first used. It does make
transformers, once somebody imports it, recognise compact GloBE checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from globe.hf.register import install

if TYPE_CHECKING:
    from globe.checkpoint import extract_expert_weights
    from globe.hf.loading import load
    from globe.hf.patching import patch_model

__all__ = ["extract_expert_weights", "load", "patch_model"]

_HOME = {
    "extract_expert_weights": "globe.checkpoint",
    "load": "globe.hf.loading",
    "patch_model": "globe.hf.patching",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


install()
