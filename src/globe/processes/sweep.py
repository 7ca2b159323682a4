"""One job of a sweep: what it may use of the machine, which jobs it waits for, and what it tells the sweep."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import Container

from globe.config.launchers import (
    RUNS,
    cores,
    device_of_job,
    jobs_at_once,
    plain_options,
    recall_gpus,
    threads_per_job,
)
from globe.files import lock
from globe.runs.folder import RunFolder, State
from globe.runs.summary import RunSummary, median_support

_log = logging.getLogger(__name__)


@contextmanager
def share_of_machine(launcher: Container, number: int, device: str) -> Iterator[None]:
    """Give one job of a sweep its threads and GPU, put back at its end (a worker does several jobs).

    `threads` of the configuration has the last word. The GPU is the current one of CUDA, which `device=cuda` means.
    """
    recall_gpus(os.environ)
    options, available = plain_options(launcher), cores()
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


def note_failure(path: Path, sentence: str) -> None:
    """Record in a run's folder why the run failed before it began; a finished run stays finished."""
    folder = RunFolder(path)
    if folder.status is None or folder.status.state is not State.finished:
        with suppress(OSError, ValueError):  # that folder may be what is wrong, and is no run's then
            folder.require_own()
            with folder.held():
                folder.end(State.failed, sentence)


def print_line(name: str, summary: RunSummary) -> None:
    """Print one line for a run of a sweep that is done."""
    number = int(HydraConfig.get().job.num) + 1 if HydraConfig.initialized() else 1
    of = os.environ.get(RUNS)
    seconds = sum(one.seconds for one in summary.runtimes.values())
    print(
        f"run {number}{f' of {of}' if of else ''}: {name}: RelFrob {summary.relfrob:.4f}, {summary.kept:.1%} kept, "
        f"support {median_support(summary):g}, {seconds:.1f} s",
        flush=True,
    )
