"""`KEY=VALUE` arguments of the commands that need no Hydra, into a checked dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TypeVar

from omegaconf import OmegaConf

from globe.errors import ConfigError

T = TypeVar("T")


def parse_options(kind: type[T], arguments: Sequence[str]) -> T:
    """The options of a command line, typed as the dataclass `kind` says; `MISSING` ones have to be given.

    Raises ConfigError with one sentence, or OmegaConf's error, which `globe.config.commands` turns into one.
    """
    assert is_dataclass(kind)
    groups = {one.name for one in fields(kind) if is_dataclass(one.default_factory)}
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError(f"{argument!r} is not understood: give KEY=VALUE, --help lists the keys")
        if (group := argument.partition("=")[0]) in groups:
            raise ConfigError(f"{argument!r} is a group of options: give {group}.KEY=VALUE")
    options = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist(list(arguments)))
    for one in fields(kind):
        if OmegaConf.is_missing(options, one.name):
            raise ConfigError(f"{one.name} is missing: give {one.name}=..., --help lists the keys")
    checked = OmegaConf.to_object(options)
    assert isinstance(checked, kind)
    return checked
