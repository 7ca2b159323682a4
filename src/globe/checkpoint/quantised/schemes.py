"""The table: method of `quantization_config` -> forms of its matrices, and what the config says of each.

A method that is not here is refused by name. A new one is a line of `METHODS`, and a form in the file of its family.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from globe.checkpoint.quantised import fp4, integers, scaled
from globe.checkpoint.quantised.form import Form, Settings

SettingsOf = Callable[[str], Settings]
"""Name of a matrix -> what the config says of it."""


@dataclass(frozen=True, slots=True)
class Method:
    """How checkpoints of one `quant_method` are read."""

    forms: tuple[Form, ...]
    settings: Callable[[Mapping[str, Any]], SettingsOf]
    """Read `quantization_config`. Raises ValueError saying what in it is not read."""


def _blocks(config: Mapping[str, Any]) -> SettingsOf:
    block = _pair(config.get("weight_block_size"), "weight_block_size")
    return lambda _: Settings(block=block)


def _nothing(config: Mapping[str, Any]) -> SettingsOf:
    return lambda _: Settings()


_MOST_REPEATS = 4
_LONGEST_NAME = 200
"""Characters of a module's name that a regular expression sees, so that one of so many repeats ends soon."""
_LONGEST_MATCHING, _LONGEST_EACH = 2.0, 1e-3
"""Seconds of processor time for all modules together, and those that each adds."""
_FORMATS = (
    "dense", "naive-quantized", "float-quantized", "int-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip


def _groups(config: Mapping[str, Any]) -> SettingsOf:
    """Return the module groups of compressed-tensors, by name, regular expression (`re:...`) or class (`Linear`)."""
    sparsity = config.get("sparsity_config") or {}
    records = [one for one in dict(config.get("config_groups") or {}).values() if isinstance(one, dict)]
    formats = [config.get("format"), *(one.get("format") for one in records)]
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        formats.append(sparsity["format"])
    if foreign := [one for one in formats if one is not None and one not in _FORMATS]:
        raise ValueError(f"its format {foreign[0]!r} is not one that is read, such as pack-quantized")
    if not records:
        raise ValueError("it has no config_groups")
    groups = [(_targets(one.get("targets")), _weights(one.get("weights"))) for one in records]
    if all(settings == groups[0][1] for _, settings in groups):
        return lambda _: groups[0][1]
    clock, used, compared = time.process_time, 0.0, 0

    def settings_of(name: str) -> Settings:
        nonlocal used, compared
        began = clock()
        module = name.removesuffix(".weight")
        named = (settings for targets, settings in groups if any(one(module) for one in targets))
        found = next(named, groups[0][1])
        used, compared = used + clock() - began, compared + 1
        if used > _LONGEST_MATCHING + compared * _LONGEST_EACH:
            raise ValueError("its targets take too long to compare")
        return found

    return settings_of


def _weights(record: Any) -> Settings:
    record = {} if record is None else record
    if not isinstance(record, dict):
        raise ValueError("its weights are no object")
    bits = _integer(record.get("num_bits", 8), "num_bits", 1, 8)
    group = record.get("group_size")
    group = None if group in (None, -1) else _integer(group, "group_size", 1, 1 << 30)
    block = _pair(record.get("block_structure"), "block_structure")
    return Settings(bits=bits, group=group, block=(1, group) if block is None and group else block)


def _targets(targets: Any) -> list[Callable[[str], bool]]:
    """Return, for each target of a group, a function that says whether it means a module of this name."""
    if not isinstance(targets, list | None):
        raise ValueError("its targets are no list")
    return [_target(one) for one in targets or [] if isinstance(one, str)]


def _target(target: str) -> Callable[[str], bool]:
    """Raise ValueError for a regular expression that could take for ever (one that repeats a group, or many parts)."""
    if not target.startswith("re:"):
        return lambda module: module == target or module.endswith(f".{target}")
    pattern = target.removeprefix("re:")
    plain = re.sub(r"\\.", "", pattern)
    if (
        re.search(r"\)[*+{]", plain)
        or len(re.findall(r"[*+{]", plain)) > _MOST_REPEATS
        or len(pattern) > 1000
    ):
        raise ValueError(f"its target {target[:60]!r} repeats too much")
    compiled = re.compile(pattern)
    return lambda module: compiled.match(module[:_LONGEST_NAME]) is not None


def _gptq(config: Mapping[str, Any]) -> SettingsOf:
    form = config.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        raise ValueError(f"its checkpoint_format {form!r} is neither gptq nor gptq_v2")
    bits = _integer(config.get("bits", 4), "bits", 2, 8)
    group = config.get("group_size", -1)
    group = None if group in (None, -1) else _integer(group, "group_size", 1, 1 << 30)
    settings = Settings(bits=bits, group=group, zero_offset=int(form == "gptq"))
    return lambda _: settings


def _awq(config: Mapping[str, Any]) -> SettingsOf:
    bits, version = config.get("bits", config.get("w_bit", 4)), str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise ValueError(f"its bits={bits!r} version={version!r} are read as 4 and 'gemm' only")
    return _nothing(config)


METHODS: dict[str, Method] = {
    "fp8": Method((scaled.INVERSE_SCALES, scaled.SCALES), _blocks),
    "fbgemm_fp8": Method((scaled.SCALES,), _nothing),
    "mxfp4": Method((fp4.BLOCKS,), _nothing),
    "compressed-tensors": Method((scaled.SCALES, fp4.PACKED, integers.PACKED), _groups),
    "gptq": Method((integers.GPTQ,), _gptq),
    "awq": Method((integers.AWQ,), _awq),
    "modelopt": Method((scaled.SCALES, fp4.MODELOPT), _nothing),
}


def _pair(value: Any, key: str) -> tuple[int, int] | None:
    if value is None:
        return None
    parts = value.split("x") if isinstance(value, str) else value
    if not isinstance(parts, list) or len(parts) != 2:
        raise ValueError(f"its {key} {value!r} is no pair of sizes")
    first, second = (
        _integer(int(one) if isinstance(value, str) and one.isdigit() else one, key, 1, 1 << 30)
        for one in parts
    )
    return first, second


def _integer(value: Any, key: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"its {key} {value!r} is no integer from {least} to {most}")
    return value
