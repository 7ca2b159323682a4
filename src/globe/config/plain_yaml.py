"""A YAML file of unknown origin as plain values: bounded, with nothing in it resolved or looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from globe.files import read_bytes

LARGEST = 1 << 20
"""Bytes that a config.yaml may have."""


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, by which a small file could stand for a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias")
        return super().compose_node(parent, index)


def read_yaml(file: Path) -> dict[Any, Any]:
    """Return the mapping in a file; `${...}` in it stays text.

    Raises
    ------
    OSError, or ValueError with the reason if it is no regular file, too large, no YAML, or no mapping.
    """
    try:
        value = yaml.load(
            read_bytes(file, LARGEST), Loader=_PlainLoader
        )  # a SafeLoader: it builds plain values only
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError("it holds no mapping")
    return value
