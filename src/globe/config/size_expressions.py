"""Sizes as expressions in the sizes of the experts: `n/4`, `3p/4`, `0.25n`, `round(n/8)`, or integers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from math import ceil, floor

from globe.errors import ConfigError

_ROUNDED = re.compile(r"(floor|ceil|round)\s*\((.*)\)")
_SIZE = re.compile(r"(?:(\d+(?:\.\d+)?)\s*\*?\s*)?([a-z])\s*(?:/\s*([1-9]\d*))?")


def resolve_size(key: str, value: int | str, symbols: Mapping[str, int], limit: int, limit_is: str) -> int:
    """Return a size given as an integer or as `n`, `n/4`, `3n/4`, `3*n/4`, `0.25n`, in the symbols that are allowed.

    Arithmetic is exact, and nothing is rounded unless the text says `floor(n/8)`, `ceil(n/8)` or `round(n/8)`. Raises
    ConfigError naming `key` and the remedy when the text is not understood, when the result is not a whole number
    (with its neighbours), or when it is not in [1, `limit`]; `limit_is` says in words what the limit is.
    """
    exact = exact_size(key, value, symbols)
    shown = f"{key}={value}" if isinstance(value, int) else f"{key}={value!r}, which is {float(exact):g},"
    if exact > limit:
        raise ConfigError(f"{shown} is more than {limit_is}: give at most {limit}")
    if exact.denominator != 1:
        below, above = int(exact), int(exact) + 1
        neighbours = f"{below} or {above}" if below else f"{above}"
        known = ", ".join(f"{symbol}={number}" for symbol, number in symbols.items())
        raise ConfigError(
            f"{key}={value!r} is {float(exact):g} for {known}, not a whole number: give {neighbours}, or "
            f"round({value})"
        )
    if exact < 1:
        raise ConfigError(f"{shown} is too small: give at least 1 and at most {limit}")
    return int(exact)


def exact_size(key: str, value: int | str, symbols: Mapping[str, int]) -> Fraction:
    """Return what such a text comes to, whole or not. Raises ConfigError naming `key` if it is not understood."""
    exact = _evaluate(value, symbols)
    if exact is None:
        letters = " or ".join(symbols)
        letter = next(iter(symbols))
        raise ConfigError(
            f"{key}={value!r} is not understood: give an integer or an expression in {letters} such as "
            f"{letter}/4, 3{letter}/4 or round({letter}/8)"
        )
    return exact


def default_size(value: str, symbols: Mapping[str, int], limit: int) -> int:
    """Return a size that nobody typed: rounded, at least 1 and at most `limit`."""
    exact = _evaluate(f"round({value})", symbols)
    assert exact is not None
    return min(max(int(exact), 1), limit)


def _evaluate(value: int | str, symbols: Mapping[str, int]) -> Fraction | None:
    if isinstance(value, int):
        return None if isinstance(value, bool) else Fraction(value)
    text = value.strip()
    if re.fullmatch(r"[+-]?\d+", text):
        return Fraction(int(text))
    if rounded := _ROUNDED.fullmatch(text):
        inside = _evaluate(rounded[2], symbols)
        if inside is None:
            return None
        # of two neighbours equally near, round takes the larger
        half = {"floor": floor, "ceil": ceil, "round": lambda exact: floor(exact + Fraction(1, 2))}
        return Fraction(half[rounded[1]](inside))
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in symbols:
        return None
    factor, symbol, divisor = match.groups()
    return Fraction(factor or 1) * symbols[symbol] / Fraction(divisor or 1)
