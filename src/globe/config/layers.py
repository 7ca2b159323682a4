"""The spellings of `layer`: a number, `all`, a range, a list of these; and ranges as they are shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from globe.errors import ConfigError

GROUPS = {"early": range(4, 9), "middle": range(12, 17), "late": range(20, 25)}
"""Layers that have a name, for sweeps over depth, by their numbers in a model of 24 layers and more. A group is cut to
the layers that a model has experts in, unlike a range, which asks for every one of its layers."""
_RANGE = re.compile(r"(\d+)\s*(?:-|:|\.\.)\s*(\d+)")


def parse_layers(value: Any, moe_layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the layers that `layer` asks for, ascending, each once.

    `value` is None for the middle one of those that have experts, a number, `all`, a range `4-8`, `4:8` or `4..8` (both
    ends included), `early`, `middle` or `late` (4-8, 12-16, 20-24, cut to the layers that have experts), or a list of
    these; `moe_layers` are the layers that have experts, out of `num_layers`. Raises ConfigError with one sentence
    that names `layer`, the value and what is allowed; a dense layer is refused as such.
    """
    allowed = f"give layers out of {ranges(moe_layers)}"
    if value is None and moe_layers:
        return (moe_layers[len(moe_layers) // 2],)
    asked = _expand(value, moe_layers, num_layers)
    if not asked:
        raise ConfigError(
            f"layer={_shown(value)} is not understood: give a layer number, all, a list like [4,12,20] or a "
            f"range like 4-8, out of {ranges(moe_layers)}"
        )
    for layer in asked:
        which = "" if value == layer else f" asks for layer {layer}, which"
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"layer={_shown(value)}{which} is not in this model of {num_layers} layers: {allowed}"
            )
        if layer not in moe_layers:
            raise ConfigError(f"layer={_shown(value)}{which} is a dense layer without experts: {allowed}")
    return tuple(sorted(set(asked)))


def _expand(value: Any, moe_layers: Sequence[int], num_layers: int) -> list[int]:
    """Return all layers asked for, unchecked; none when any part is not understood."""

    def inner(one: Any) -> list[int]:
        return _expand(one, moe_layers, num_layers)

    match value:
        case bool():
            return []
        case int():
            return [value]
        case list() | tuple():
            parts = [inner(one) for one in value]
            return [layer for part in parts for layer in part] if all(parts) else []
        case str():
            text = value.strip()
            if text == "all":
                return list(moe_layers)
            if text in GROUPS:
                # none of them in this model: asked for as a whole, and refused like a range
                return [layer for layer in GROUPS[text] if layer in moe_layers] or list(GROUPS[text])
            if re.fullmatch(r"-?\d+", text):
                return [int(text)]
            if re.search(r"[,+]", text):
                return inner(re.split(r"[,+]", text))
            bounds = _RANGE.fullmatch(text)
            if bounds:
                first, last = int(bounds[1]), int(bounds[2])
                # one layer past the end is enough to be refused, however large a number was typed
                return list(range(first, min(last, max(first, num_layers)) + 1))
    return []


def _shown(value: Any) -> str:
    return str(value).replace("'", "") if isinstance(value, list | tuple | str) and value else repr(value)


def ranges(layers: Sequence[int], *, join: str = ", ", digits: int = 1) -> str:
    """Return `0-23`, or `1, 3, 5` where layers are not neighbours; numbers have at least `digits` digits."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return join.join(
        f"{first:0{digits}d}-{last:0{digits}d}" if last > first else f"{first:0{digits}d}"
        for first, last in runs
    )
