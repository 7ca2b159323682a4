"""The command line of `globe.train` as it was meant, before Hydra reads it: texts are texts and no YAML."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from globe.config.command_line import path_as_typed, text_options
from globe.config.composition import conf_dir
from globe.config.schema import Config

PATHS = ("model.path", "output", "hydra.run.dir", "hydra.sweep.dir")
"""Options that are paths, in which `~` stands for the home folder."""
_ONE_VALUE = ("hydra.run.dir", "hydra.sweep.dir", "output", "sweep")
"""Options that a sweep cannot vary, whose commas are part of the text."""
_CALL = re.compile(r"\w+\(.*\)")


def as_typed(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with quotes wherever Hydra would read a text as something else.

    Hydra takes `output=2026_11_29` for a number, `0123` for 83, and refuses `/a=b/m`. In a sweep
    (`-m`) commas still separate the values of an option. `model=` followed by a path or a hub id means `model.path=`.
    Raises ConfigError for an empty path or a home folder that is not there.
    """
    sweep = bool({"-m", "--multirun"} & set(arguments))
    texts = set(text_options(Config)) | set(PATHS)
    return [_one(argument, texts, sweep) for argument in arguments]


def _one(argument: str, texts: Collection[str], sweep: bool) -> str:
    key, equals, value = argument.partition("=")
    if key == "model" and equals and _is_model_path(value):
        key = "model.path"
    if not equals or value[:1] in ("'", '"'):
        return argument
    if key not in texts or (value == "null" and key != "output"):
        return argument
    if sweep and _CALL.fullmatch(value):  # such as choice(a,b)
        return argument
    values = value.split(",") if sweep and key not in _ONE_VALUE else [value]
    return f"{key}={','.join(_quoted(path_as_typed(key, one) if key in PATHS else one) for one in values)}"


def _is_model_path(value: str) -> bool:
    names = {file.stem for file in (Path(conf_dir()) / "model").glob("*.yaml")}
    with suppress(OSError, ValueError):  # too long for a path, or none
        return value not in names and ("/" in value or value.startswith("~") or Path(value).is_dir())
    return False


def _quoted(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()
