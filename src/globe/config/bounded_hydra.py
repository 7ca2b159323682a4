"""Bounds around what Hydra reads: files that are large or stand for something large, interpolations that explode."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from omegaconf.base import Container
from omegaconf.errors import InterpolationResolutionError

from globe.config.plain_yaml import LARGEST, require_bounded
from globe.errors import ConfigError
from globe.files import read_bytes

_MOST_LOOKUPS, _LONGEST = 1000, 1 << 16
"""Interpolations that one value may come to in the end, and characters that each of them may have."""


def bound_hydra() -> None:
    """Make Hydra refuse files and interpolations beyond the bounds, with a ConfigError or an OmegaConf error."""
    Plugins.instance()  # which imports the sources once more, so that a class imported by name is another one
    source: Any = SourcesRegistry.instance().resolve("file")
    read = source.load_config
    if getattr(read, "bounded", False):
        return
    resolve, look_up = Container.resolve_parse_tree, Container._resolve_node_interpolation
    lookups: list[int] = []  # one counter, as long as a value is being resolved

    def load_config(self: Any, config_path: str) -> Any:
        file = Path(self.path, self._normalize_file_name(config_path))
        with suppress(FileNotFoundError):  # Hydra says which there are
            try:
                require_bounded(read_bytes(file, LARGEST))
            except ValueError as error:
                raise ConfigError(f"{file} can't be read ({error}): simplify it") from error
        return read(self, config_path)

    def resolve_parse_tree(self: Container, *args: Any, **options: Any) -> Any:
        outermost = not lookups
        if outermost:
            lookups.append(0)
        try:
            value = resolve(self, *args, **options)
        finally:
            if outermost:
                lookups.clear()
        if isinstance(value, str) and len(value) > _LONGEST:
            raise InterpolationResolutionError(f"it comes to more than {_LONGEST:,} characters")
        return value

    def resolve_node(self: Container, *args: Any, **options: Any) -> Any:
        if lookups:
            lookups[0] += 1
            if lookups[0] > _MOST_LOOKUPS:
                raise InterpolationResolutionError(f"it comes to more than {_MOST_LOOKUPS:,} interpolations")
        return look_up(self, *args, **options)

    load_config.bounded = True  # type: ignore[attr-defined]
    source.load_config = load_config
    Container.resolve_parse_tree = resolve_parse_tree  # type: ignore[method-assign]
    Container._resolve_node_interpolation = resolve_node  # type: ignore[method-assign]
