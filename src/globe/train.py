"""Learn the banks of a checkpoint: `python -m globe.train family=up layer=12 bank.m=n/4`.

For each layer and family: read the experts, normalise them, fit a bank, finalise it, write its artefact. Never
more than one bank's experts are in memory. The same command goes on where a killed run stopped, and reports a
finished run without repeating it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import Container, OmegaConf

from globe.bank.file import is_intact
from globe.calibration.run import RECORD, Calibration
from globe.checkpoint import Checkpoint, load_architecture, open_checkpoint
from globe.config import commands as entry
from globe.config.composition import conf_dir, config_dict, plain, register, to_config
from globe.config.help import train_help
from globe.config.identity import identity
from globe.config.schema import Config
from globe.config.typed import as_typed
from globe.errors import CheckpointError, FitError
from globe.files import write_json
from globe.fit.calibrated import calibration_for
from globe.fit.ledger import Ledger
from globe.fit.one_bank import Run, learn_bank
from globe.fit.plan import BankPlan, Outline, is_met_by_every_atom, outline, plan
from globe.fit.provenance import stamp
from globe.numerics.device import arithmetic, limit_threads, return_large_blocks
from globe.processes import sweep, torchrun, watch
from globe.reporting.budget_plot import draw_allocation
from globe.runs.folder import RunFolder, State
from globe.runs.progress import Progress
from globe.runs.shared_fit import adopt
from globe.runs.summary import RunSummary, print_summary, read_summary
from globe.runs.tracking import RunInfo, open_sinks
from globe.sizes.banks import is_chosen, sized_banks
from globe.sizes.dry_run import dry_run
from globe.sizes.model_size import with_model_size
from globe.sizes.sizing import Sizing

register()
_log = logging.getLogger("globe.train")
_AMBIENT = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
)
"""Variables of the environment that choose between kernels, and so change rounding."""
_failure: Exception | None = None
"""Of the only job of a process that does a single run: `main` reports it, Hydra need not know."""


def run(node: Container, path: Path, *, sweep_name: str | None = None) -> float | tuple[float, ...]:
    """Do one run in its folder, from its composed configuration to its `objectives`: RelFrob, the mean over its banks.

    A finished run is only reported, unless `overwrite=true`; the banks of one that differs in `S_cache` alone are
    taken. In a sweep a run waits for another that does the same fit, and a failure of any kind is recorded in the
    folder; a run on its own leaves no trace of an error that stopped it before its first bank. A dry run only prints.
    Raises GlobeError or OSError with the run's status set to `failed`, KeyboardInterrupt with `interrupted`.
    """
    if OmegaConf.select(node, "dry_run"):
        dry_run(to_config(node))
        return math.nan
    task = _Task(node, RunFolder(path), identity(plain(node)), sweep_name)
    with nullcontext() if sweep_name is None else sweep.one_at_a_time(path.parent, task.fit):
        try:
            summary, objectives = _run(task, torchrun.Group())
        except Exception as error:
            if sweep_name is not None:
                sweep.note_failure(path, entry.explain(error) or f"{type(error).__name__}: {error}")
            raise
    record = summary.to_dict()
    figures = tuple(math.nan if record[name] is None else float(record[name]) for name in objectives)
    return figures[0] if len(figures) == 1 else figures


@dataclass(frozen=True, slots=True)
class _Task:
    """One run: its composed configuration, its folder, the identity of its fit and the sweep that it belongs to."""

    node: Container
    folder: RunFolder
    fit: str
    sweep_name: str | None = None


def _run(task: _Task, group: torchrun.Group) -> tuple[RunSummary, Sequence[str]]:
    config = to_config(task.node)
    # before anything is opened for writing: a finished run is reported from a disk that takes nothing
    summary = None if config.overwrite else finished_summary(task.folder, config)
    group.same(summary is None, {})
    if summary is None:
        summary = train(config, task, group)
    _show(task, summary)
    return summary, config.objectives


def _show(task: _Task, summary: RunSummary) -> None:
    if task.sweep_name is None:
        dense = load_architecture(summary.source["model_type"]).dense_only is not None
        print_summary(summary, task.folder.path, dense=dense)
    else:
        sweep.print_line(task.folder.path.name, summary)


def train(config: Config, task: _Task, group: torchrun.Group) -> RunSummary:
    """Learn all banks that are not learned yet. A bank that fails is reported, and the others go on, in one process.

    With several processes all of them call this; those that do not lead write nothing into the folder. Options and
    checkpoint are checked before the folder is touched.

    Raises ConfigError or CheckpointError when nothing can be begun, ArtefactError or OSError when results
    can't be written.
    """
    with arithmetic(config) as device:
        model = config.model
        checkpoint = group.in_turn(  # so that a hub's files are downloaded once
            lambda: open_checkpoint(
                model.path,
                revision=model.revision,
                force_download=model.force_download and group.leads,
            )
        )
        if checkpoint.dense_only and group.leads:
            _log.warning(
                "%s: globe.patch takes format=dense, whose files are as large as before",
                checkpoint.dense_only,
            )
        outlines = outline(config, checkpoint)
        config = with_model_size(config, checkpoint, outlines)
        limit_threads(config, max(math.prod(bank.shape) for bank in outlines))
        banks = () if is_chosen(config) else plan(config, checkpoint)
        with _begun(task, config, group) as folder:
            calibration = _calibrate(config, checkpoint, outlines, folder, device, group)
            if is_chosen(config):
                drawn = partial(draw_allocation, folder=folder.path)
                sizing = Sizing(checkpoint, device, calibration, on_allocation=drawn)
                banks = sized_banks(config, outlines, sizing, folder)
            ledger = Ledger(
                folder,
                name=task.folder.path.name,
                source=checkpoint.source(),
                stamp=stamp(model.path),
                total_parameters=checkpoint.total_parameters,
                device=str(device),
                S_cache=config.S_cache,
            )
            job = Run(config, checkpoint, folder, device, lambda key, record: None, group, calibration)
            _learn(job, banks, ledger, task)
            if ledger.summary.failed:
                _show(task, ledger.summary)
                raise FitError(ledger.summary.failure)
    return ledger.summary


@contextmanager
def _begun(task: _Task, config: Config, group: torchrun.Group) -> Iterator[RunFolder]:
    """Hold the run's folder, and yield the one that results go into: with `overwrite=true` a hidden one inside it.

    The old results stay until the new ones are whole.
    """
    if not group.leads:
        yield task.folder
        return
    task.folder.require_own()
    with task.folder.held():
        task.folder.take_repetition()
        repeats = config.overwrite and task.folder.status is not None
        folder = task.folder.repetition() if repeats else task.folder
        with ExitStack() as around:
            around.enter_context(folder.recorded(entry.explain))
            around.enter_context(group.one_reason())
            group.record = folder.end
            folder.begin(plain(task.node))
            around.enter_context(task.folder.logged())
            for name in filter(os.environ.get, _AMBIENT):
                _log.info("of the environment, and part of the numbers: %s=%s", name, os.environ[name])
            if not config.overwrite:
                adopt(folder, task.fit)
            yield folder
        if repeats:
            task.folder.take_repetition()


def _learn(job: Run, banks: Sequence[BankPlan], ledger: Ledger, task: _Task) -> None:
    if not job.group.leads:
        for bank in banks:
            learn_bank(job, bank)
        return
    _warn_of_sizes(job.config, banks)
    with _watched(job, banks, ledger, task) as progress:
        job = replace(job, on_step=progress.step)
        for bank in banks:
            progress.begin(bank.key)
            try:
                learned = learn_bank(job, bank)
                assert learned is not None
                ledger.add(bank, learned)
            except (FitError, CheckpointError) as error:
                if type(job.group) is not torchrun.Group:  # the others are in the middle of that bank
                    raise
                ledger.fail(bank, error)
            progress.end()


def _calibrate(
    config: Config,
    checkpoint: Checkpoint,
    outlines: Sequence[Outline],
    folder: RunFolder,
    device: torch.device,
    group: torchrun.Group,
) -> Calibration | None:
    """The statistics that the metric asks for, taken now unless they are on disk; the run tells what they are of."""
    found = group.in_turn(lambda: calibration_for(config, checkpoint, outlines, device))
    if group.leads and found is not None:
        write_json(folder.path / RECORD, found.record | {"folder": str(found.folder)})
    return found


def _warn_of_sizes(config: Config, banks: Sequence[BankPlan]) -> None:
    """A sweep may well ask for more than there was, or for more atoms than there are; a person should know."""
    for bank in banks:
        if bank.kept >= 1 and bank.precision is None:
            _log.warning("%s: %.0f %% of the parameters kept is no compression", bank.key, 100 * bank.kept)
        if is_met_by_every_atom(config, bank.sizes.m):
            asked = f"codes.target_support={config.codes.target_support}"
            _log.info("%s: %s is more than its m=%d atoms, so codes are dense", bank.key, asked, bank.sizes.m)


@contextmanager
def _watched(job: Run, banks: Sequence[BankPlan], ledger: Ledger, task: _Task) -> Iterator[Progress]:
    """The progress bar and the sinks of a run, which are told how it ended."""
    config, home = job.config, task.folder.path
    options = config_dict(config) | {"sizes": {bank.key: asdict(bank.sizes) for bank in banks}}
    options |= {key: _shared(banks, key) for key in ("m", "r", "target_support")}
    info = RunInfo(
        home.name, home, options, tuple(bank.key for bank in banks), task.sweep_name, job.folder.path
    )
    sinks = open_sinks(config.wandb, job.folder.metrics_file, info)
    state = State.failed
    try:
        with Progress(len(banks), config.train.steps, sinks) as progress:
            yield progress
        state = State.failed if ledger.summary.failed else State.finished
    except KeyboardInterrupt:
        state = State.interrupted
        raise
    finally:
        sinks.finish(ledger.summary.to_dict(), state=str(state))


def _shared(banks: Sequence[BankPlan], size: str) -> Any:
    """Return the size that all banks have, or the different ones in the order of the banks."""
    values = list(dict.fromkeys(getattr(bank.sizes, size) for bank in banks))
    return values[0] if len(values) == 1 else values


def finished_summary(folder: RunFolder, config: Config) -> RunSummary | None:
    """Return the summary of a run that is finished, whose artefacts are whole and whose checkpoint is as it was."""
    if folder.status is None or folder.status.state is not State.finished:
        return None
    summary = read_summary(folder.summary_file)
    if summary is None or summary.stamp != stamp(config.model.path) or summary.S_cache != config.S_cache:
        return None
    if not all(is_intact(folder.bank(bank.key)) for bank in summary.banks):
        return None
    _log.info("this run is finished already; overwrite=true repeats it")
    return summary


def _job(node: Container) -> float | tuple[float, ...]:
    """What Hydra calls, once or for every run of a sweep."""
    global _failure
    settings = HydraConfig.get()
    path = Path(settings.runtime.output_dir)
    multirun = settings.mode is RunMode.MULTIRUN
    try:
        if torchrun.launched():
            _share(node, path)
            return math.nan
        if not multirun:
            return run(node, path)
        device = str(OmegaConf.select(node, "device"))
        with sweep.share_of_machine(settings.launcher, settings.job.num, device):
            return run(node, path, sweep_name=Path(settings.sweep.dir).name)
    except Exception as error:
        if (sentence := entry.explain(error)) is None:
            raise
        if multirun:  # the other jobs go on, and this one's sentence should not wait for the last
            _log.error("%s", sentence)
            raise CompactHydraException(sentence) from error
        _failure = error
        return math.nan


def _share(node: Container, path: Path) -> None:
    """Do one run by all processes of torchrun."""
    config = to_config(node)
    torchrun.refuse(config)
    task = _Task(node, RunFolder(path), identity(plain(node)))
    with torchrun.joined(config) as group:
        if group.leads:
            _run(task, group)
        elif group.same(None, {})[0]:
            train(config, task, group)


def main() -> None:
    """`python -m globe.train`, without the command line's program name."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        entry.start(lambda: print(train_help()))
        return
    if not torchrun.leads():
        sys.argv += torchrun.SILENT

    def app() -> None:
        sys.argv[1:] = as_typed(sys.argv[1:])
        if torchrun.launched():
            torchrun.refuse_sweep(sys.argv)
        with watch.outcome(), watch.without_empty_folders():
            hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")(_job)()
        if _failure is not None:
            raise _failure

    return_large_blocks()
    entry.start(app, say=entry.say if torchrun.speaks() else torchrun.leave_it_to_the_first)


if __name__ == "__main__":
    # under its own name, so that the workers of a parallel launcher can import the job
    from globe.train import main as imported_main

    imported_main()
