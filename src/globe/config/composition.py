"""From `conf/` and the command line to checked dataclasses: the schemas made known to Hydra, and what it composed read.

Nothing here imports torch.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hydra._internal.grammar.functions import Functions
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser import overrides_parser
from hydra.core.plugins import Plugins
from omegaconf import Container, DictConfig, OmegaConf

from globe.config.bounded_hydra import bound_hydra
from globe.config.identity import run_name
from globe.config.launchers import SWEPT, cores, jobs_at_once
from globe.config.schema import Config, InitConfig, ModelConfig, ScheduleConfig, WandbConfig
from globe.errors import ConfigError


def register() -> None:
    """Make the schemas known to Hydra; call before `hydra.main` or `compose` reads `conf/`."""
    store = ConfigStore.instance()
    store.store(name="globe_schema", node=Config)
    for group, schema in (
        ("model", ModelConfig),
        ("init", InitConfig),
        ("schedule", ScheduleConfig),
        ("wandb", WandbConfig),
    ):
        store.store(group=group, name=f"{group}_schema", node=schema)
    _replace_plugin_configs()
    _teach_rounding()
    bound_hydra()
    OmegaConf.register_new_resolver("globe_run_name", _run_name_resolver, replace=True)
    OmegaConf.register_new_resolver("globe_jobs_at_once", _jobs_resolver, replace=True)


def _teach_rounding() -> None:
    """Let Hydra's grammar pass on `round(n/8)`, `floor(n/8)` and `ceil(n/8)` as texts, also within sweeps.

    It would refuse them as functions that it does not know, and quotes around them do not survive every sweeper.
    """
    make = overrides_parser.create_functions
    if getattr(make, "rounds", False):
        return

    def with_rounding() -> Functions:
        functions = make()
        for name in ("round", "floor", "ceil"):
            functions.register(name=name, func=_as_text(name))
        return functions

    with_rounding.rounds = True  # type: ignore[attr-defined]
    overrides_parser.create_functions = with_rounding


def _as_text(name: str) -> Callable[[str], str]:
    def written(size: str) -> str:
        return f"{name}({size})"

    # Hydra compares types, and annotations are their names here
    size = inspect.Parameter("size", inspect.Parameter.POSITIONAL_ONLY, annotation=str)
    written.__signature__ = inspect.Signature([size], return_annotation=str)  # type: ignore[attr-defined]
    return written


def _replace_plugin_configs() -> None:
    """Let the files of `conf/hydra` stand for what plugins store under the same names.

    Hydra would take the plugin's as their schema, with a deprecation warning, and refuse those with defaults.
    """
    Plugins.instance()  # which makes the plugins store theirs, before ours could be replaced in turn
    stored = ConfigStore.instance().repo.get("hydra", {})
    with suppress(ConfigError):  # no conf/: said when it is needed
        for file in Path(conf_dir()).glob("hydra/*/*.yaml"):
            stored.get(file.parent.name, {}).pop(file.name, None)


def conf_dir() -> str:
    """Return the absolute path of `conf/` in the checkout or in the installed wheel."""
    here = Path(__file__).resolve().parents[1]
    for candidate in (here.parents[1] / "conf", here / "conf"):
        if (candidate / "config.yaml").is_file():
            return str(candidate)
    raise ConfigError(f"no conf/config.yaml beside {here}: reinstall globe, or pass --config-dir")


def to_config(node: Container) -> Config:
    """Return the composed Hydra config as checked dataclasses. Raises ConfigError, also for an unknown key."""
    assert isinstance(node, DictConfig)
    known = [one.name for one in fields(Config)]
    for key in map(str, node):
        # Hydra lets `+key=value` add to the top level, where it would change nothing but the run's name
        if key not in known:
            raise ConfigError(f"{key} is not an option: give one of {', '.join(known)}")
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config


def plain(node: Container) -> dict[str, Any]:
    """Return a composed Hydra config as a nested dict of plain values, without Hydra's own node."""
    assert isinstance(node, DictConfig)
    masked = OmegaConf.masked_copy(node, [key for key in map(str, node) if key != "hydra"])
    result = OmegaConf.to_container(masked, resolve=True, enum_to_str=True)
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


def config_dict(config: Config) -> dict[str, Any]:
    """Return the same nested dict from checked dataclasses."""
    return json.loads(json.dumps(asdict(config)))


def _run_name_resolver(*, _root_: Container) -> str:
    swept = os.environ.get(SWEPT, "")
    return run_name(plain(_root_), swept.split(",") if swept else ())


def _jobs_resolver(*, _root_: Container) -> int:
    """Return how many trials a sweeper should ask for at once: as many as the launcher has going."""
    return jobs_at_once(OmegaConf.select(_root_, "hydra.launcher"), cores())
