"""Make transformers recognise compact GloBE checkpoints, without importing it before somebody else does.

A compact checkpoint has a `model_type` of its own, `globe_qwen2_moe` where the original says `qwen2_moe`: a
program that does not know GloBE stops at once ("model type ... but Transformers does not recognize this
architecture") instead of drawing random experts. `install` teaches `AutoConfig` these names. If transformers
is imported already that happens now; if not, it happens at the moment its table of model types is imported,
by a finder on `sys.meta_path` that lets the ordinary import run and then adds to the table.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from globe.checkpoint.model_config import PREFIX

_TABLE = "transformers.models.auto.configuration_auto"
_ARCHITECTURES = Path(__file__).parents[1] / "checkpoint" / "architectures"
"""One JSON file per model type; only their names are needed here, and `globe.checkpoint` would import torch."""


class CompactConfig:
    """Stands in transformers' table of configurations for one `globe_*` model type; makes the real one."""

    model_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the upstream configuration of a compact checkpoint, as `AutoConfig.from_pretrained` asks for it."""
        from globe.hf.quantizer import compact_config

        return compact_config(config_dict, **kwargs)


def install() -> None:
    """Register the `globe_*` model types, now or as soon as transformers is imported. Safe to call again."""
    table = sys.modules.get(_TABLE)
    if table is not None and hasattr(table, "AutoConfig"):
        _register(table)
    if not any(_is_ours(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register(table: ModuleType) -> None:
    for path in _ARCHITECTURES.glob("*.json"):
        name = PREFIX + path.stem
        table.AutoConfig.register(name, type(name, (CompactConfig,), {"model_type": name}), exist_ok=True)


def _is_ours(finder: object) -> bool:
    """Compare by name: a module that is loaded twice makes a second class, and two finders would ask each other."""
    kind = finder if isinstance(finder, type) else type(finder)
    return (kind.__module__, kind.__qualname__) == (_AfterImport.__module__, _AfterImport.__qualname__)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the one module as the other finders do, and has it loaded with `_register` called at the end."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if find is None or _is_ours(finder) else find(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenRegister(spec.loader)
                return spec
        return None


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register(module)

    def __getattr__(self, name: str) -> Any:
        """Return the source, file name and the like, for tracebacks and `inspect`."""
        return getattr(self.inner, name)
