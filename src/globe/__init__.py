"""GloBE: compress Mixture-of-Experts language models by learning one global basis bank for their experts.

Importing the package loads nothing heavy; the public names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from globe.checkpoint import extract_expert_weights

__all__ = ["extract_expert_weights"]

_HOME = {"extract_expert_weights": "globe.checkpoint"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
