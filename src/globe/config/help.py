"""What `globe train --help` prints: groups, launchers and every option with the text that stands under its field."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

from globe.config.composition import conf_dir
from globe.config.fit_options import CurveConfig
from globe.config.schema import Config

_WIDTH = 100
_USAGE = """\
globe train [-m] [GROUP=NAME ...] [KEY=VALUE ...]          (or python -m globe.train ...)

Learn the banks of a checkpoint. The same command goes on where a killed run stopped, and reports a finished one.

  globe train                                                  one layer of the embedded model
  globe train model=Qwen/Qwen1.5-MoE-A2.7B family=both layer=all bank.kept=0.5
  globe train dry_run=true bank.m=n/4 bank.r=p/2               sizes, memory and time, and no fit
  globe train -m 'bank.m=round(n/8),n/4' seed=0,1              a sweep: every combination
  globe train -m experiment=ablation hydra/launcher=joblib     the same, several runs at once
  torchrun --nproc-per-node=2 -m globe.train layer=12          one bank's experts over two processes

-m, --multirun   run every combination of values that are separated by commas
--cfg job        print the composed configuration and run nothing
--hydra-help     help of Hydra, which reads the command line (tab completion among it)
"""


def train_help() -> str:
    """Return the whole text; it reads nothing but the sources and the names of the files in `conf/`."""
    groups = ("experiment", "method", "model", "init", "schedule", "wandb", "hydra/launcher", "hydra/sweeper")
    parts = [_USAGE, "Groups of options that are set together, GROUP=NAME:\n"]
    parts += [_entry(group, ", ".join(_names(group))) for group in groups]
    parts.append("\nOptions, KEY=VALUE, with what they are by default (null is: not given):\n")
    parts += [_entry(key, text) for key, text in _options(Config, "")]
    return "\n".join(parts)


def meanings(kind: type) -> dict[str, str]:
    """Return the string that stands under each field of a dataclass in its source, by the field's name."""
    (declared,) = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body
    assert isinstance(declared, ast.ClassDef)
    found = {}
    for one, after in itertools.pairwise(declared.body):
        if not isinstance(one, ast.AnnAssign) or not isinstance(one.target, ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[one.target.id] = " ".join(str(after.value.value).split())
    return found


def _names(group: str) -> list[str]:
    own = sorted(file.stem for file in (Path(conf_dir()) / group).glob("*.yaml"))
    return ["basic", *own] if group.startswith("hydra/") else own


def _options(kind: type, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield each option with its default and its meaning, those of groups after those of the run."""
    hints, said = get_type_hints(kind), meanings(kind)
    groups = []
    for one in fields(kind):
        hint = hints[one.name]
        if is_dataclass(hint) and hint is not CurveConfig:
            groups.append((one.name, hint))
            continue
        key = f"{prefix}{one.name}={_shown(_default(one))}"
        if hint is CurveConfig:
            key = f"{prefix}{one.name}.{{kind,start,end,warmup,hold}}"
        yield key, said.get(one.name, "")
    for name, inner in groups:
        assert isinstance(inner, type)
        yield from _options(inner, f"{prefix}{name}.")


def _default(one: Field[Any]) -> Any:
    if one.default is not MISSING:
        return one.default
    assert callable(one.default_factory)
    return one.default_factory()


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, StrEnum | str) else str(value).replace("'", "").replace(" ", "")


def _entry(key: str, text: str) -> str:
    return textwrap.fill(
        f"{key:26} {text}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 29, break_on_hyphens=False
    )
