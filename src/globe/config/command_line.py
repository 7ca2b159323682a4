"""`KEY=VALUE` arguments of the commands that need no Hydra, into a checked dataclass, and what all their mains do."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import MISSING, OmegaConf

from globe.errors import ConfigError

T = TypeVar("T")
_KEY = re.compile(r"[A-Za-z_][\w.]*")
_PATH = "path"


def path_option(default: str | None = MISSING) -> Any:
    """Return the dataclass field of an option that is a path: a `~` at its beginning is the home folder."""
    return field(default=default, metadata={_PATH: True})


def run_command(
    usage: str,
    kind: type[T],
    run: Callable[[T], None],
    *,
    positional: str | None = None,
    resumes: Callable[[T], bool] = lambda options: False,
) -> None:
    """Do what every main does: print `usage` if help is asked for, or else parse the command line and `run` it.

    `resumes` says whether the command goes on where it was interrupted, which is said then.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(usage)
        return
    options = parse_options(kind, arguments, positional=positional)
    try:
        run(options)
    except KeyboardInterrupt as stop:
        again = "goes on from here" if resumes(options) else "begins anew"
        stop.args = (f"the same command {again}",)  # the same exception, which says by what it was stopped
        raise


def parse_options(kind: type[T], arguments: Sequence[str], *, positional: str | None = None) -> T:
    """Return the options of a command line as the dataclass `kind`; those that are `MISSING` in it have to be given.

    An option that is a text (`str`, or `str | None`) is taken as it was typed, so that `out=2026_11_29`, `out=0123`
    and `'out=a #2'` name these very folders; `null` is None where the option may be None. All others are YAML. The
    first argument may be the value of the option `positional` alone; that it is a value shows in what stands before
    its first equals sign, which is no name, as in `/a=b/m`. The model is `model` and `model.path` in every command that
    reads one, whatever the option is called.

    Raises
    ------
    ConfigError with one sentence, or an error of OmegaConf, which `globe.config.commands` turns into one.
    """
    assert is_dataclass(kind)
    given = list(arguments)
    if positional is not None and given and not _names_an_option(given[0]):
        given[0] = f"{positional}={given[0]}"
    texts, groups = text_options(kind), _groups(kind)
    model = next((one for one in ("model.path", "model", "path") if one in texts), None)
    taken: dict[str, str | None] = {}
    rest = []
    for argument in given:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not understood: give KEY=VALUE, --help lists the keys")
        key = model if model is not None and key in ("model", "model.path") else key
        if key in groups:
            raise ConfigError(f"{argument!r} is a group of options: give {key}.KEY=VALUE")
        if key in texts:
            taken[key] = _as_typed(key, value, *texts[key])
        else:
            rest.append(argument)
    merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist(rest))
    values = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(values, dict)
    for key, text in taken.items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = text
    for one in fields(kind):
        if values[one.name] == MISSING and one.name not in taken:
            raise ConfigError(f"{one.name} is missing: give {one.name}=..., --help lists the keys")
    return kind(**{str(name): groups[name](**one) if name in groups else one for name, one in values.items()})


def _names_an_option(argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    return bool(equals) and _KEY.fullmatch(key) is not None


def _groups(kind: type) -> dict[Any, Any]:
    """Return the dataclasses of the groups of options, by their names."""
    return {one.name: one.default_factory for one in fields(kind) if is_dataclass(one.default_factory)}


def text_options(kind: type, prefix: str = "") -> dict[str, tuple[bool, bool]]:
    """Return, for each option that is a text, whether it may be None and whether it is a path, by its key."""
    hints, found = get_type_hints(kind), dict[str, tuple[bool, bool]]()
    for one in fields(kind):
        hint = hints[one.name]
        parts = set(get_args(hint)) if isinstance(hint, UnionType) else {hint}
        if parts - {NoneType} == {str}:
            found[prefix + one.name] = (NoneType in parts, _is_path(one))
        elif is_dataclass(one.default_factory):
            found |= text_options(one.default_factory, f"{prefix}{one.name}.")
    return found


def _is_path(one: Field[Any]) -> bool:
    return bool(one.metadata.get(_PATH))


def _as_typed(key: str, value: str, optional: bool, path: bool) -> str | None:
    if optional and value == "null":
        return None
    return path_as_typed(key, value) if path else _without_null(key, value)


def path_as_typed(key: str, value: str) -> str:
    """Return a path, `~` at its beginning made the home folder. Raises ConfigError if it is none, or none is known."""
    if not value.strip():
        raise ConfigError(f"{key}= is empty: give a path, such as {key}=./folder")
    try:
        return (
            str(Path(_without_null(key, value)).expanduser())
            if value.startswith("~")
            else _without_null(key, value)
        )
    except RuntimeError as error:  # a user that this machine does not know
        raise ConfigError(
            f"{key}={value}: there is no such home folder, ./{value} is a folder here"
        ) from error


def _without_null(key: str, value: str) -> str:
    if "\0" in value:
        raise ConfigError(f"{key} holds a null character, which no name may hold: leave it out")
    return value
