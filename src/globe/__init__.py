"""GloBE: compress Mixture-of-Experts language models by learning one global basis bank for their experts.

Importing the package loads nothing heavy; the public names below are imported when they are first used. It does make
transformers, once somebody imports it, recognise compact GloBE checkpoints.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from globe.hf.register import install

if TYPE_CHECKING:
    from globe.bank.learned import Bank, load_bank
    from globe.checkpoint import extract_expert_weights
    from globe.hf.compress import compress
    from globe.hf.loading import load
    from globe.hf.patching import patch_model
    from globe.sizes.interface import fit

__version__ = "0.1.0"
"""The same as in pyproject.toml, which a test compares."""
__all__ = ["Bank", "compress", "extract_expert_weights", "fit", "load", "load_bank", "patch_model"]

_HOME = {
    "Bank": "globe.bank.learned",
    "compress": "globe.hf.compress",
    "extract_expert_weights": "globe.checkpoint",
    "load": "globe.hf.loading",
    "load_bank": "globe.bank.learned",
    "patch_model": "globe.hf.patching",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _CallableRoom(ModuleType):
    """The room `globe.fit`, whose name is also that of a function: `globe.fit(experts)`.

    Python sets `globe.fit` to the room whenever something in it is imported, so the room itself has to be callable.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("globe.sizes.interface").fit(*args, **kwargs)


importlib.import_module("globe.fit").__class__ = _CallableRoom
install()
