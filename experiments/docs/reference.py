"""The configuration reference, docs/configuration.md, from the dataclasses and the files of conf/.

    python experiments/docs/reference.py            # writes the page (make docs-reference)
    python experiments/docs/reference.py --check    # says whether the committed page is the one this would write

Meanings are the strings under the fields of `src/globe/config/`, so an option is explained in one place only.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from globe.config import schema as config
from globe.config.composition import conf_dir
from globe.config.fit_options import CurveConfig
from globe.config.help import meanings
from globe.config.schema import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = """\
# Configuration reference

*Written by `make docs-reference` from `src/globe/config/` and `conf/`: change the text there, not here.*

`python -m globe.train` takes options as `key=value`; nested ones have dots, `bank.m=n/4`. `null` means "not given".
Quote what your shell would read itself: `'layer=[4,12,20]'`. A group (`method`, `model`, `init`, `schedule`, `wandb`)
takes the name of one of its files, `schedule=linear`, and single options of it can still be given beside that. `-m`
runs every combination of comma-separated values. `--cfg job` shows the composed configuration and runs nothing. An
unknown key, or a value that cannot be, ends in one sentence before anything is read.
"""
COMMANDS = ("globe.calibrate", "globe.patch", "globe.evaluate", "globe.report", "globe.inspect")
"""Beside `globe.train`; what each says of itself is its reference."""
KINDS = {int: "integer", float: "number", str: "text"}
TEXTS = {"S_cache": "`all`"}
"""What the text may be where an option takes an integer or a text; elsewhere that is an expression in sizes."""


class Option(NamedTuple):
    key: str
    values: str
    default: str
    meaning: str


def values(name: str, kind: Any) -> str:
    """What may be given for an option, in words or as the list of choices."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if set(parts) >= {int, str}:
        text = TEXTS.get(name, "expression")
        return ", ".join(["integer", text, *(["`null`"] if type(None) in parts else [])])
    words = []
    for part in parts:
        if part is type(None):
            words.append("`null`")
        elif part is bool:
            words.append("`true`, `false`")
        elif isinstance(part, type) and issubclass(part, StrEnum):
            words.append(", ".join(f"`{one}`" for one in part))
        elif typing.get_origin(part) is list:
            words.append("list")
        else:
            words.append(KINDS.get(part, "number, list, range or `all`"))
    return ", ".join(words)


def plain(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, StrEnum | str):
        return f"`{value}`"
    if isinstance(value, CurveConfig):
        return f"`{value.kind}` at {value.start:g}"
    return f"`{json.dumps(value)}`"


def default_of(field: Field[Any]) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]


def options(kind: type, prefix: str) -> Iterator[Option]:
    """The options of one group, without those of groups inside it, but for curves, which are one option here."""
    hints, said = typing.get_type_hints(kind), meanings(kind)
    for field in fields(kind):
        hint, default = hints[field.name], default_of(field)
        if not is_dataclass(hint):
            yield Option(
                prefix + field.name, values(field.name, hint), plain(default), said.get(field.name, "")
            )
        elif hint is CurveConfig:
            yield Option(prefix + field.name, "[curve](#curves)", plain(default), said.get(field.name, ""))


def groups() -> Iterator[tuple[str, type]]:
    hints = typing.get_type_hints(Config)
    for field in fields(Config):
        if is_dataclass(hints[field.name]):
            yield field.name, hints[field.name]


def table(rows: Iterator[Option]) -> str:
    lines = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = [f"`{row.key}`", row.values, row.default, row.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def group_section(name: str, kind: type) -> str:
    text = [f"## {name}"]
    own = inspect.getdoc(kind) or ""
    if own and not own.startswith(f"{kind.__name__}("):  # which is what a dataclass without a docstring has
        text.append(own)
    text.append(table(options(kind, f"{name}.")))
    return "\n\n".join(text)


def flattened(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={'null' if value is None else value}"


def file_row(path: Path) -> tuple[str, str, str, str]:
    """Name, comment, options set and options swept of one file of `conf/`."""
    text = path.read_text(encoding="utf-8")
    said = " ".join(
        line.lstrip("# ") for line in text.splitlines() if line.startswith("#") and "@" not in line
    )
    record = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text), resolve=False))
    swept = record.pop("hydra", {}).get("sweeper", {}).get("params", {})
    chosen = [one for one in record.pop("defaults", []) if isinstance(one, dict)]
    named = [f"{key.removeprefix('override /')}={value}" for one in chosen for key, value in one.items()]
    prefix = "" if "@package _global_" in text else f"{path.parent.name}."
    sets = ", ".join(f"`{one}`" for one in [*named, *flattened(record, prefix)])
    return path.stem, said, sets, ", ".join(f"`{key}={value}`" for key, value in swept.items())


def files_section(group: str) -> str:
    """The files of one group of `conf/`."""
    rows = [file_row(path) for path in sorted((Path(conf_dir()) / group).glob("*.yaml"))]
    names = ["what it is", "sets", "runs each of"]
    shown = [at for at in range(3) if any(row[at + 1] for row in rows)]
    lines = [
        f"### {group}",
        "",
        "| | " + " | ".join(names[at] for at in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for row in rows:
        lines.append("| " + " | ".join([f"`{group}={row[0]}`", *(row[at + 1] for at in shown)]) + " |")
    return "\n".join(lines)


def render() -> str:
    """The whole page."""
    parts = [HEAD.rstrip(), "## The run", table(options(Config, ""))]
    parts += [group_section(name, kind) for name, kind in groups()]
    parts += ["### Curves", inspect.getdoc(CurveConfig) or "", table(options(CurveConfig, "schedule.lam."))]
    parts += ["## Files of conf/", config_files_intro()]
    parts += [
        files_section(group) for group in ("experiment", "method", "model", "init", "schedule", "wandb")
    ]
    for name in COMMANDS:
        usage = (importlib.import_module(name).__doc__ or "").strip()
        parts.append(f"## {name}\n\n```text\n{usage}\n```")
    return "\n\n".join(parts) + "\n"


def config_files_intro() -> str:
    return (
        "A file sets several options at once. An experiment may set any of them, and may be a sweep by itself: "
        "`python -m globe.train -m experiment=ablation`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    checking = parser.parse_args().check
    page = render()
    if not checking:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE} is not what {Path(config.__file__).name} says: run make docs-reference")


if __name__ == "__main__":
    main()
