"""A YAML file of unknown origin as plain values: bounded, with nothing in it resolved or looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from globe.files import read_bytes

LARGEST = 1 << 18
"""Bytes that a configuration file may have, most of which are comments then."""
MOST_VALUES = 10_000
"""Values that a configuration file may have, each alias counted with all that it stands for."""
_DEEPEST, _MOST_REFERENCES = 64, 100
"""Levels of a file, and `${...}` in one of its values."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(file: Path) -> dict[Any, Any]:
    """Return the mapping in a file; `${...}` in it stays text.

    Raises
    ------
    OSError, or ValueError with the reason if it is no regular file, too large, no YAML, or no mapping.
    """
    content = read_bytes(file, LARGEST)
    try:
        require_bounded(content)
        value = yaml.load(content, Loader=_Loader)  # a SafeLoader: it builds plain values only
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError("it holds no mapping")
    return value


def require_bounded(content: bytes) -> None:
    """Look at the events of a YAML text, without building anything of it.

    Raises ValueError with the reason if it has, or by its aliases stands for, too many values, is nested too deeply,
    or has a value with too many interpolations, and YAMLError if it is no YAML.
    """
    held: list[int] = [0]
    anchors: dict[str, int | None] = {}
    names: list[str | None] = []
    for event in yaml.parse(content, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            names.append(event.anchor)
            held.append(1)
            if event.anchor:
                anchors[event.anchor] = None  # not complete yet
        elif isinstance(event, yaml.CollectionEndEvent):
            count, name = held.pop(), names.pop()
            held[-1] += count
            if name:
                anchors[name] = count
        elif isinstance(event, yaml.AliasEvent):
            stands_for = anchors.get(event.anchor, 1)
            if stands_for is None:
                raise ValueError(f"its alias *{event.anchor} stands within what it stands for")
            held[-1] += stands_for
        elif isinstance(event, yaml.ScalarEvent):
            held[-1] += 1
            if event.value.count("${") > _MOST_REFERENCES:
                raise ValueError(f"a value in it has more than {_MOST_REFERENCES} interpolations")
            if event.anchor:
                anchors[event.anchor] = 1
        if len(held) > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        if sum(held) > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values, or stands for them by its aliases")
