"""Which runs are the same run: the options that change numbers, a hash of them, and the folder name it gives.

Works on plain nested dicts, as Hydra composes them, before any check: a run that fails has a name as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NUMERICS_VERSION = 5
"""Part of a run's identity; raised whenever the same options give other numbers."""

DEFAULT_SIZES = {"m": "n/4", "r": "p/2"}
"""Values of `bank.m` and `bank.r`, rounded to whole numbers, where neither they nor `bank.kept` is given."""

_NOT_IDENTITY = {
    "": (
        *("output", "sweep", "overwrite", "dry_run", "wandb", "device", "threads", "hydra"),
        *("S_cache", "objectives"),
    ),
    "train": ("checkpoint_every",),
    "normalise": ("store",),
    "model": ("force_download",),
    "calibrate": ("batch", "out"),
}
"""Options that say where a run happens, who watches and how its banks are used, by group; all others change its
numbers. `S_cache` is in the name of a run all the same: runs that differ in it alone share a fit."""


_SIZES = (("m", "m"), ("r", "r"), ("k", "atom_rank"))


def numerics(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a plain nested config that changes a run's numbers."""
    kept = {key: value for key, value in config.items() if key not in _NOT_IDENTITY[""]}
    for group, blind in _NOT_IDENTITY.items():
        if group:
            kept[group] = {key: value for key, value in kept[group].items() if key not in blind}
    kept["bank"] = _with_default_sizes(kept["bank"])
    if kept["serve"]["speed"] is None and kept["serve"]["memory"] is None:
        del kept["serve"]
    if kept["normalise"]["metric"] == "auto":
        metric = "none" if kept["calibrate"]["text"] is None else "inputs"
        kept["normalise"] = kept["normalise"] | {"metric": metric}
    if kept["normalise"]["metric"] != "inputs":
        del kept["calibrate"]  # statistics that nothing asks for
    return kept


def _with_default_sizes(bank: dict[str, Any]) -> dict[str, Any]:
    """Return the same options with the default sizes written out, so that typing them makes no other run."""
    if bank["kept"] is not None or bank["size"] is not None:
        return dict(bank)
    return bank | {key: size for key, size in DEFAULT_SIZES.items() if bank[key] is None}


def identity(config: dict[str, Any]) -> str:
    """Return eight hexadecimal digits that name a run by all that changes its numbers.

    `config` is the plain nested dict of a composed config. A checkpoint folder counts by its absolute path.
    """
    kept = numerics(config)
    path = kept["model"]["path"]
    if path and Path(path).is_dir():
        kept["model"]["path"] = str(Path(path).resolve())
    text = kept.get("calibrate", {}).get("text")
    if text and Path(text).is_file():
        kept["calibrate"]["text"] = str(Path(text).resolve())
    whole = json.dumps([NUMERICS_VERSION, kept], sort_keys=True, default=str)
    return hashlib.sha256(whole.encode()).hexdigest()[:8]


_NAMED = (
    *("layer", "family", "method", "model.path", "model", "S_cache"),
    *("bank.kept", "bank.scope", "bank.m", "bank.r", "bank.atom_rank", "bank.bits", "codes.target_support"),
)
"""Options that the name of every run shows."""


def _values(config: dict[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield what the options of a sweep are in this run; a group is shown by what its file is for."""
    for key in keys:
        value: Any = config
        for name in _FILE_SAYS.get(key, key).split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if key not in _NAMED and not isinstance(value, dict | list) and value is not None:
            yield key, value


_FILE_SAYS = {"init": "init.seeding"}


def run_name(config: dict[str, Any], swept: Sequence[str] = ()) -> str:
    """Return the folder name of a run: what one looks for first, what a sweep varies (`swept`), and its identity.

    It has no slash, space or equals sign.
    """
    path = config["model"]["path"]
    layer = config["layer"]
    layer = "+".join(map(str, layer)) if isinstance(layer, list) else "mid" if layer is None else str(layer)
    parts = [Path(path).resolve().name if path else "embedded", str(config["family"]), f"L{layer}"]
    if config["method"] != "globe":
        parts.insert(1, str(config["method"]))
    bank = _with_default_sizes(config["bank"])
    if bank["scope"] != "family":
        parts.append(f"per-{bank['scope']}")
    if bank["kept"] is not None:
        parts.append(f"kept{bank['kept']}")
    if bank["size"] is not None:
        parts.append(f"size{bank['size']}")
    if bank["bits"] is not None:
        parts.append(f"{bank['bits']:g}bits")
    parts += [f"{letter}{bank[key]}" for letter, key in _SIZES if bank[key] is not None]
    if config["codes"]["target_support"] is not None:
        parts.append(f"s{config['codes']['target_support']}")
    if config["S_cache"] != "all":
        parts.append(f"S{config['S_cache']}")
    parts += [f"{key.rpartition('.')[2]}{value}" for key, value in _values(config, swept)]
    slug = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part.replace("/", "over")).strip("-") for part in parts)
    return f"{slug[:100]}_{identity(config)}"
