"""Checks of single values, which end in one sentence that names the option, the value and what is allowed."""

from __future__ import annotations

import math

from globe.errors import ConfigError


def check(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value!r} is not possible: give {allowed}")


def positive(value: float) -> bool:
    return 0 < value < math.inf


def at_least_zero(value: float) -> bool:
    return 0 <= value < math.inf
