"""From keyword arguments in Python to the same checked configuration that the command line makes.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hydra import compose, initialize_config_dir
from omegaconf import Container, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from globe.config.commands import explain
from globe.config.composition import conf_dir, register, to_config
from globe.config.schema import Config
from globe.errors import ConfigError, GlobeError


def configure(values: Mapping[str, object], overrides: Sequence[str] = ()) -> Config:
    """Compose `conf/` with `overrides`, words as the command line takes them, and set `values` by their dotted names.

    A value of None leaves what the files say. Raises ConfigError with the sentence that the command would give.
    """
    try:
        register()
        with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
            node = compose("config", overrides=list(overrides))
        for key, value in values.items():
            if value is not None:
                _set(node, key, value)
        return to_config(node)
    except GlobeError:
        raise
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        raise ConfigError(sentence) from error


def _set(node: Container, key: str, value: object) -> None:
    try:
        OmegaConf.update(node, key, value)
    except OmegaConfBaseException as error:
        sentence = explain(error) or str(error)
        raise ConfigError(
            sentence.replace(f"{key} is not possible", f"{key}={value!r} is not possible")
        ) from error
