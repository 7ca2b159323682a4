"""python -m globe.inspect PATH [KEY=VALUE ...]

What a checkpoint, a patched checkpoint, a run or a single bank holds. Of a checkpoint only config.json and headers are
read, no weight; the banks of a run are read whole and verified, and a damaged one is named (exit code 1).

PATH               checkpoint folder, hub id or `embedded`; run of globe.train; bank (a folder with globe.json)
path=PATH          the same, for a path such as name=value/folder that would be taken for an option; `model=PATH` too
revision=null      revision of a hub id
m=[n/8,n/4,n/2]    atoms to predict the kept shares for: integers or expressions in n
r=[p/2,3p/4,p]     rows of an atom likewise, in p or d; p stands for d where experts have more rows than columns
json=false         true prints one JSON object instead of tables
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from globe.config.command_line import path_option, run_command
from globe.config.commands import start
from globe.errors import ArtefactError, ConfigError, printable
from globe.inspection.banks import inspect_banks, is_banks
from globe.inspection.models import inspect_model
from globe.inspection.show import show_banks, show_model


@dataclass
class InspectOptions:
    """The options of the command, as the text above says."""

    path: str = path_option()
    revision: str | None = None
    m: list[str] = field(default_factory=lambda: ["n/8", "n/4", "n/2"])
    r: list[str] = field(default_factory=lambda: ["p/2", "3p/4", "p"])
    json: bool = False


def inspect(options: InspectOptions) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what is at the path, as plain JSON, and what is damaged there: file -> sentence.

    Raises ConfigError, CheckpointError or ArtefactError with one sentence when there is nothing to look at.
    """
    root = Path(options.path)
    if is_banks(root):
        return inspect_banks(root)
    if not (root / "config.json").exists() and any(root.glob("*/status.json")):
        raise ConfigError(
            f"{options.path} is a folder of runs: give one of them, or python -m globe.report sweep={options.path}"
        )
    return inspect_model(options.path, options.revision, ms=options.m, rs=options.r), {}


def main() -> None:
    run_command(__doc__ or "", InspectOptions, _inspect_and_show, positional="path")


def _inspect_and_show(options: InspectOptions) -> None:
    found, damaged = inspect(options)
    if options.json:
        print(json.dumps(found | {"damaged": damaged}, indent=1, sort_keys=True, allow_nan=False))
    elif found["kind"] in ("checkpoint", "compact"):
        show_model(found)
    else:
        show_banks(found)
    if damaged:
        for sentence in damaged.values():
            print(printable(sentence), file=sys.stderr)
        raise ArtefactError(f"{len(damaged)} of the files of {options.path} can't be trusted")


if __name__ == "__main__":
    start(main)
