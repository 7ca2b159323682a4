"""A sweep as a whole: what each job may use of the machine, which jobs wait for each other, and which failed.

Works with any launcher and sweeper, since it looks at run folders and not at what jobs return: a sweeper that
goes on after a failure (optuna) would hide it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.experimental.callback import Callback
from omegaconf import Container, OmegaConf

from globe.config.launchers import cores, device_of_job, jobs_at_once, recall_gpus, threads_per_job
from globe.errors import SweepError
from globe.files import lock
from globe.runs.folder import RunFolder, State

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A sweep as it stood at its beginning."""

    folder: Path
    before: dict[str, str]
    """status.json of each run that was there, as text"""


_sweep: _Begun | None = None
"""The sweep of this process, which starts the jobs; None in the processes of the jobs."""


class SweepWatch(Callback):
    """Told by Hydra (`hydra.callbacks`) when a sweep begins, in the process that starts the jobs."""

    def on_multirun_start(self, config: Container, **kwargs: Any) -> None:
        global _sweep
        folder = Path(OmegaConf.select(config, "hydra.sweep.dir"))
        _sweep = _Begun(folder, _statuses(folder))
        logging.getLogger("alembic").setLevel(logging.WARNING)  # of optuna's; it announces each of its parts
        threads = threads_per_job(_plain(OmegaConf.select(config, "hydra.launcher")), cores())
        if threads is not None:  # of libraries that read it once, in the processes to come
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@contextmanager
def outcome() -> Iterator[None]:
    """Around a program that may be a sweep: raises SweepError if several runs failed, or if a sweeper hid one."""
    try:
        yield
    except Exception as error:
        if len(failed := _failed()) > 1:
            raise SweepError(_sentence(failed)) from error
        raise
    if failed := _failed():
        raise SweepError(_sentence(failed))


def _sentence(failed: dict[str, str]) -> str:
    assert _sweep is not None
    name, why = next(iter(failed.items()))
    return (
        f"{len(failed)} run{'s' * (len(failed) != 1)} of {_sweep.folder} failed, such as {name} ({why}): the same "
        "command tries them again and keeps the others"
    )


def _failed() -> dict[str, str]:
    """Runs that failed since the sweep of this process began, each with the reason."""
    if _sweep is None:
        return {}
    changed = [name for name, text in _statuses(_sweep.folder).items() if text != _sweep.before.get(name)]
    found = {}
    for name in changed:
        status = RunFolder(_sweep.folder / name).status
        if status is not None and status.state is State.failed:
            found[name] = status.error or "no reason recorded"
    return found


def _statuses(folder: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text("utf-8") for file in sorted(folder.glob("*/status.json"))}


@contextmanager
def share_of_machine(launcher: Container, number: int, device: str) -> Iterator[None]:
    """Threads and GPU of one job of a sweep, put back at its end (a worker does several jobs).

    `threads` of the configuration has the last word. The GPU is the current one of CUDA, which `device=cuda` means.
    """
    recall_gpus(os.environ)
    options, available = _plain(launcher), cores()
    threads, before = threads_per_job(options, available), torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(min(threads, before))
    if device != "cpu":
        at_once = jobs_at_once(options, available)
        index = device_of_job(number, torch.cuda.device_count(), at_once=at_once)
        if index is not None:
            torch.cuda.set_device(index)
            _log.info("GPU %d of %d", index, torch.cuda.device_count())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_at_a_time(folder: Path, fit: str) -> Iterator[None]:
    """Hold the fit of that identity among the runs in a folder; waits while another process has it.

    Runs that share a fit differ in nothing, or in `S_cache` alone: the one that comes second finds it done. So does
    a repeated sweep that meets a worker of a killed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".{fit}.lock"
    with ExitStack() as held:
        try:
            held.enter_context(lock(file))
        except BlockingIOError:
            _log.info("waiting for another process that does the same fit (%s)", fit)
            held.enter_context(lock(file, wait=True))
        yield


def _plain(node: Container) -> dict[str, Any]:
    found = OmegaConf.to_container(node, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}
