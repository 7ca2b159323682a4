"""From a configuration and a checkpoint to plain integers: which layers, which banks, how large each one is.

Resolved once, after the checkpoint is open; nothing is written back into the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

from globe.am.records import Sizes
from globe.config import Config, Family
from globe.errors import ConfigError

_RANGE = re.compile(r"(\d+)\s*(?:-|:|\.\.)\s*(\d+)")
_SIZE = re.compile(r"(?:(\d+(?:\.\d+)?)\s*\*?\s*)?([a-z])\s*(?:/\s*([1-9]\d*))?")


@runtime_checkable
class Shape(Protocol):
    """Of the routed experts of one layer and family."""

    @property
    def n(self) -> int: ...
    @property
    def p(self) -> int: ...
    @property
    def d(self) -> int: ...


@runtime_checkable
class Source(Protocol):
    """What a plan needs to know of a checkpoint; `globe.checkpoint.Checkpoint` is one."""

    @property
    def num_layers(self) -> int: ...
    @property
    def moe_layers(self) -> tuple[int, ...]: ...
    def shape(self, layer: int, family: str, /) -> Shape: ...


class Matrices(NamedTuple):
    """The experts of one layer and family."""

    layer: int
    family: str


@dataclass(frozen=True, slots=True)
class BankPlan:
    """One bank to learn: whose experts share it, and its sizes."""

    members: tuple[Matrices, ...]
    sizes: Sizes

    @property
    def key(self) -> str:
        """Name in folders, logs and tables: `layer012.up`."""
        return "+".join(f"layer{member.layer:03d}.{member.family}" for member in self.members)


def plan(config: Config, checkpoint: Source) -> tuple[BankPlan, ...]:
    """The banks of a run in the order they are learned: layer by layer, up before gate.

    A bank is shared by the n = min(experts, model.max_experts) routed experts of one layer and family, and by
    the shared expert if `model.include_shared` asks for it; `family=both` makes one bank each. Raises
    ConfigError when a layer does not exist or a size does not come out.
    """
    families = (Family.up, Family.gate) if config.family is Family.both else (config.family,)
    layers = parse_layers(config.layer, checkpoint.moe_layers, checkpoint.num_layers)
    return tuple(
        BankPlan((member,), resolve_sizes(config, checkpoint, member))
        for member in (Matrices(layer, str(family)) for layer in layers for family in families)
    )


def resolve_sizes(config: Config, checkpoint: Source, member: Matrices) -> Sizes:
    """The sizes of the bank of one layer and family. Raises ConfigError naming the size that can't be."""
    shape = checkpoint.shape(*member)
    n = shape.n if config.model.max_experts is None else min(shape.n, config.model.max_experts)
    n += config.model.include_shared
    p, d = shape.p, shape.d
    m = resolve_size("bank.m", config.bank.m, {"n": n}, n, f"the {n} experts that share the bank")
    rank = f"min(p, d)={min(p, d)}, the rank of a {p} x {d} expert"
    r = resolve_size("bank.r", config.bank.r, {"p": p, "d": d}, min(p, d), rank)
    support = config.codes.target_support
    if support is not None:
        support = resolve_size("codes.target_support", support, {"m": m}, m, f"the {m} atoms of the bank")
    return Sizes(n=n, p=p, d=d, m=m, r=r, target_support=support)


def resolve_size(key: str, value: int | str, symbols: Mapping[str, int], limit: int, limit_is: str) -> int:
    """A size given as an integer or as `n`, `n/4`, `3n/4`, `3*n/4`, `0.25n`, in the symbols that are allowed.

    Exact rational arithmetic: nothing is rounded. Raises ConfigError naming `key` and the remedy when the
    text is not understood, when the result is not a whole number (with its neighbours), or when it is not
    in [1, `limit`]; `limit_is` says in words what the limit is.
    """
    exact = _evaluate(value, symbols)
    if exact is None:
        letters = " or ".join(symbols)
        letter = next(iter(symbols))
        raise ConfigError(
            f"{key}={value!r} is not understood: give an integer or an expression in {letters} such as "
            f"{letter}/4, 3{letter}/4 or {letter}"
        )
    shown = f"{key}={value}" if isinstance(value, int) else f"{key}={value!r}, which is {float(exact):g},"
    if exact > limit:
        raise ConfigError(f"{shown} is more than {limit_is}: give at most {limit}")
    if exact.denominator != 1:
        below, above = int(exact), int(exact) + 1
        neighbours = f"{below} or {above}" if below else f"{above}"
        known = ", ".join(f"{symbol}={number}" for symbol, number in symbols.items())
        raise ConfigError(
            f"{key}={value!r} is {float(exact):g} for {known}, not a whole number: give {neighbours}"
        )
    if exact < 1:
        raise ConfigError(f"{shown} is too small: give at least 1 and at most {limit}")
    return int(exact)


def _evaluate(value: int | str, symbols: Mapping[str, int]) -> Fraction | None:
    if isinstance(value, int):
        return None if isinstance(value, bool) else Fraction(value)
    text = value.strip()
    if re.fullmatch(r"[+-]?\d+", text):
        return Fraction(int(text))
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in symbols:
        return None
    factor, symbol, divisor = match.groups()
    return Fraction(factor or 1) * symbols[symbol] / Fraction(divisor or 1)


def parse_layers(value: Any, moe_layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The layers that `layer` asks for, ascending, each once.

    `value` is a number, `all`, a range `4-8`, `4:8` or `4..8` (both ends included), or a list of these;
    `moe_layers` are the layers that have experts, out of `num_layers`. Raises ConfigError with one sentence
    naming `layer`, the value and what is allowed; a dense layer is refused as such.
    """
    allowed = f"give layers out of {_ranges(moe_layers)}"
    asked = _expand(value, moe_layers, num_layers)
    if not asked:
        raise ConfigError(
            f"layer={_shown(value)} is not understood: give a layer number, all, a list like [4,12,20] or a "
            f"range like 4-8, out of {_ranges(moe_layers)}"
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
    """All layers asked for, unchecked; empty when any part is not understood."""

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


def _ranges(layers: Sequence[int]) -> str:
    """`0-23`, or `1, 3, 5` where layers are not neighbours."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
