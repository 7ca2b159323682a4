"""A sweep as a whole: how many runs it has, which of them failed, and how they compare.

Works with any launcher and sweeper, since it looks at run folders and not at what jobs return: a sweeper that
goes on after a failure (optuna) would hide it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import Container, OmegaConf

from globe.config.launchers import RUNS, SWEPT, cores, plain_options, threads_per_job
from globe.errors import ConfigError, SweepError
from globe.files import read_bytes, require_replaceable
from globe.runs.comparison import print_comparison
from globe.runs.folder import RunFolder, State


@dataclass(frozen=True, slots=True)
class _Begun:
    """A sweep as it stood at its beginning."""

    folder: Path
    before: dict[str, bytes]
    """status.json of each run that was there"""


_sweep: _Begun | None = None
"""The sweep of this process, which starts the jobs; None in the processes of the jobs."""


class _Refused(BaseException):
    """Carries a refusal out of a callback, whose other errors Hydra only warns about."""


_made: list[Path] = []
"""Folders that Hydra makes for this process's single run, outermost first."""


class SweepWatch(Callback):
    """Told by Hydra (`hydra.callbacks`) when a run or a sweep begins, in the process that starts the jobs."""

    def on_run_start(self, config: Container, **kwargs: Any) -> None:
        with suppress(Exception):  # a wrong option, which the run itself is about to name
            folder = Path(OmegaConf.select(config, "hydra.run.dir"))
            _made[:] = [one for one in reversed((folder, *folder.parents)) if not os.path.lexists(one)]

    def on_multirun_start(self, config: Container, **kwargs: Any) -> None:
        global _sweep
        folder = Path(OmegaConf.select(config, "hydra.sweep.dir"))
        for name in ("multirun.yaml", "optimization_results.yaml"):  # which Hydra and optuna write
            try:
                require_replaceable(folder / name)
            except ConfigError as error:
                raise _Refused(error) from error
        _sweep = _Begun(folder, _statuses(folder))
        swept = _swept(config)
        os.environ[SWEPT] = ",".join(swept)
        os.environ[RUNS] = str(
            OmegaConf.select(config, "hydra.sweeper.n_trials") or math.prod(swept.values())
        )
        logging.getLogger("alembic").setLevel(logging.WARNING)  # of optuna's; it announces each of its parts
        threads = threads_per_job(plain_options(OmegaConf.select(config, "hydra.launcher")), cores())
        if threads is not None:  # of libraries that read it once, in the processes to come
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@contextmanager
def outcome() -> Iterator[None]:
    """Compare the runs of what may be a sweep, once it ends; raise SweepError if several failed or one is hidden."""
    try:
        yield
    except _Refused as refused:
        raise refused.args[0] from refused
    except Exception as error:
        if _sweep is not None:
            print_comparison(_sweep.folder)
        if len(failed := _failed()) > 1:
            raise SweepError(_sentence(failed)) from error
        raise
    if _sweep is not None:
        print_comparison(_sweep.folder)
    if failed := _failed():
        raise SweepError(_sentence(failed))


@contextmanager
def without_empty_folders() -> Iterator[None]:
    """Remove the folders that Hydra made for a single run, if nothing was put into them."""
    try:
        yield
    finally:
        for folder in reversed(_made):
            with suppress(OSError):
                folder.rmdir()
        _made.clear()


def _swept(config: Container) -> dict[str, int]:
    """Return how many values each option of a grid takes."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    texts = [f"{key}={value}" for key, value in params.items()]
    texts += list(OmegaConf.select(config, "hydra.overrides.task") or ())
    overrides = OverridesParser.create().parse_overrides(texts)
    return {
        one.get_key_element(): len(list(one.sweep_iterator())) for one in overrides if one.is_discrete_sweep()
    } | {
        one.get_key_element(): 1
        for one in overrides
        if one.is_sweep_override() and not one.is_discrete_sweep()
    }


def _sentence(failed: dict[str, str]) -> str:
    assert _sweep is not None
    name, why = next(iter(failed.items()))
    return (
        f"{len(failed)} run{'s' * (len(failed) != 1)} of {_sweep.folder} failed, such as {name} ({why}): the same "
        "command tries them again and keeps the others"
    )


def _failed() -> dict[str, str]:
    """Return the runs that failed since the sweep of this process began, each with the reason."""
    if _sweep is None:
        return {}
    changed = [name for name, text in _statuses(_sweep.folder).items() if text != _sweep.before.get(name)]
    found = {}
    for name in changed:
        status = RunFolder(_sweep.folder / name).status
        if status is None:
            found[name] = "its status.json can't be read"
        elif status.state is State.failed:
            found[name] = status.error or "no reason recorded"
    return found


def _statuses(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every status.json, by run folder and, with overwrite=true, by the repetition in it."""
    found = {}
    for file in sorted([*folder.glob("*/status.json"), *folder.glob("*/.repetition/status.json")]):
        try:
            found[str(file.parent.relative_to(folder))] = read_bytes(file)
        except (OSError, ValueError):  # one that can't be read is not the end of the others
            found[str(file.parent.relative_to(folder))] = b""
    return found
