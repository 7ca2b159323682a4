"""One bank, from the checkpoint's experts to its artefact: read, normalise, fit, finalise, write.

What is there already is used: a complete artefact is not learned again, a fit that was cut off goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import FitResult, FitState, StepRecord
from globe.am.refit import refit
from globe.am.running import require_fitting
from globe.bank.file import BankArtefact, write_artefact
from globe.calibration.run import Calibration
from globe.checkpoint import Checkpoint
from globe.config.choices import WEIGHT_METHODS, Activation
from globe.config.commands import is_out_of_memory
from globe.config.schema import Config, is_linear
from globe.errors import FitError
from globe.files import read_as, write_json
from globe.fit.bank_records import artefact_of, figures_of_bytes, figures_of_members, report_of
from globe.fit.baseline import fit_baseline
from globe.fit.figures import bank_charts, bank_figures, expert_spectra, expert_spread
from globe.fit.finalise import Finalised, finalise
from globe.fit.input_metric import metric_of, of_model
from globe.fit.options import fit_options
from globe.fit.plan import BankPlan
from globe.fit.provenance import complete_artefact, fit_fingerprint, source_of
from globe.fit.range_checks import require_finite, require_range
from globe.fit.reading import ReadExperts, read_experts
from globe.fit.rounded_weights import fit_rounded_weights
from globe.fit.unfinished_fit import Fitting, read_state, remove_state
from globe.fit.watch import Watch
from globe.numerics.chunks import halved_chunks
from globe.numerics.device import bank_seed, trim_heap
from globe.numerics.group import ALONE, ProcessGroup
from globe.processes.torchrun import Group
from globe.runs.folder import BankStatus, RunFolder, State
from globe.runs.summary import BankReport, BankRuntime

_log = logging.getLogger(__name__)
_BROKEN = (FitError, torch.linalg.LinAlgError)
"""What another seed may cure."""
_HALVINGS = 2
"""How often the chunks of a fit are halved where memory runs out."""


@dataclass(frozen=True, slots=True)
class Run:
    """The things that all banks of a run share."""

    config: Config
    checkpoint: Checkpoint
    folder: RunFolder
    device: torch.device
    on_step: Callable[[str, StepRecord], None]
    """called with the bank's key after every step"""
    group: Group = field(default_factory=Group)
    """the processes that share each bank's experts; only the one that leads writes"""
    calibration: Calibration | None = None
    """what the experts do on `calibrate.text`, if there is one"""


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    report: BankReport
    runtime: BankRuntime | None
    """None when only the artefact of an earlier process is left"""
    codes: dict[tuple[int, str], Float[Tensor, "_ m"]]
    """of each member, by layer and family"""
    fitted: bool
    """by this process; not if its artefact was complete already"""


@dataclass(frozen=True, slots=True, eq=False)
class _Begin:
    """Where the fit of a bank begins, the same for all processes."""

    source: dict[str, Any]
    fitting: Fitting
    state: FitState | None = None
    error: str | None = None
    """why the attempt before this one failed"""


def learn_bank(run: Run, bank: BankPlan) -> Learned | None:
    """Learn one bank and write its artefact, or take what an earlier process left.

    With several processes all of them call this; those that do not lead write nothing and get None. A fit that breaks
    down (FitError, a factorisation that fails) is tried once more with another seed, unless several processes share it.

    Raises FitError when that fails too or memory runs out, CheckpointError when the experts can't be read,
    ArtefactError or OSError when the results can't be written.
    """
    taken, begin = _found(run, bank) if run.group.leads else (None, None)
    begin = _of_first_process(run.group, begin)
    if begin is None:
        return taken
    try:
        return _in_memory(run, bank, begin)
    except _TooLargeError:
        raise
    except _BROKEN as error:
        if begin.fitting.attempt > 0 or type(run.group) is not Group:
            raise FitError(_sentence(error)) from error
        first = _sentence(error)
    _log.warning("%s failed (%s): trying once more with another seed", bank.key, first)
    remove_state(run.folder.partial(bank.key))
    second = replace(begin.fitting, attempt=1, step=0)
    try:
        return _in_memory(run, bank, _Begin(begin.source, second, error=first))
    except _TooLargeError:
        raise
    except _BROKEN as error:
        raise FitError(f"{_sentence(error)} (twice, with two seeds)") from error


class _TooLargeError(FitError):
    """Memory ran out, which another seed does not cure."""


def _in_memory(run: Run, bank: BankPlan, begin: _Begin) -> Learned | None:
    """Make one attempt; where memory runs out it goes on from its last checkpoint, in chunks of half the size."""
    for halvings in range(_HALVINGS + 1):
        try:
            with halved_chunks(halvings):
                return _attempt(run, bank, begin)
        except Exception as error:
            if isinstance(error, _TooLargeError) or not is_out_of_memory(error):
                raise
            if halvings == _HALVINGS or type(run.group) is not Group:
                raise _too_large(run, bank) from error
        _log.warning("%s: memory ran out, going on with smaller chunks", bank.key)
        saved = _saved(run, bank, begin.fitting.fingerprint)
        if saved is not None and saved[1].attempt == begin.fitting.attempt:
            begin = replace(begin, state=saved[0], fitting=saved[1])
    raise AssertionError


def _found(run: Run, bank: BankPlan) -> tuple[Learned | None, _Begin | None]:
    """Return what is in the run folder: the whole bank, or else where its fit begins."""
    source = source_of(run.config, run.checkpoint, bank, run.calibration)
    folder, partial = run.folder.bank(bank.key), run.folder.partial(bank.key)
    artefact = complete_artefact(folder, run.config, run.checkpoint, bank, source)
    if artefact is not None:
        remove_state(partial)  # left by a kill between writing the one and removing the other
        return _taken(run, bank, artefact), None
    fingerprint = fit_fingerprint(run.config, bank, source, run.device.type)
    state, fitting = _saved(run, bank, fingerprint) or (None, Fitting(fingerprint, 0, 0))
    return None, _Begin(source, fitting, state)


def _saved(run: Run, bank: BankPlan, fingerprint: str) -> tuple[FitState, Fitting] | None:
    def require(state: FitState) -> None:
        require_fitting(state, bank.sizes)

    return read_state(run.folder.partial(bank.key), fingerprint, require)


def _of_first_process(group: Group, begin: _Begin | None) -> _Begin | None:
    state = None if begin is None else begin.state
    numbers = None if state is None else state.numbers
    record = None if begin is None else (begin.source, asdict(begin.fitting), numbers)
    record, tensors = group.same(record, {} if state is None else state.tensors)
    if record is None:
        return None
    source, fitting, numbers = record
    return _Begin(source, Fitting(**fitting), None if numbers is None else FitState(tensors, numbers))


def _taken(run: Run, bank: BankPlan, artefact: BankArtefact) -> Learned:
    """Return what an earlier process learned."""
    report = BankReport.from_dict(artefact.metrics or {})
    run.folder.report(bank.key, BankStatus(State.finished, report.attempt, report.seed))
    return Learned(report, read_as(BankRuntime, run.folder.runtime(bank.key)), _codes(artefact), fitted=False)


def _codes(artefact: BankArtefact) -> dict[tuple[int, str], Float[Tensor, "_ m"]]:
    codes = artefact.codes.cpu()
    return {(one.layer, one.family): codes[one.start : one.stop] for one in artefact.members}


def _attempt(run: Run, bank: BankPlan, begin: _Begin) -> Learned | None:
    """Run one fit, from the start or from a state, to the artefact."""
    clock = time.perf_counter()
    config, key, fitting = run.config, bank.key, begin.fitting
    seed = bank_seed(config.seed, key, fitting.attempt)
    if run.group.leads:
        run.folder.report(key, BankStatus(State.running, fitting.attempt, seed, begin.error))
        run.folder.rewind_metrics(key, fitting.step)
    if begin.state is not None:
        _log.info("%s: going on after step %d", key, fitting.step)
    trim_heap()  # of the bank before
    group = run.group.share(bank.sizes.n)
    read = _read(run, bank, group)
    joined = read.joined
    watch = Watch(key, fitting, run.folder.partial(key) if run.group.leads else None, run.on_step)
    result, done, activation = _fitted(run, bank, read, begin.state, watch, seed, group)
    scheduled = watch.last if bank.baseline is None else None
    spectra, spread = expert_spectra(joined.experts, group), expert_spread(joined.experts, group)
    if not run.group.leads:
        return None
    if group is not ALONE:
        joined = replace(joined, scale=done.scale, starts=bank.outline.starts)
    artefact = artefact_of(
        config, run.checkpoint, bank, joined, result.lam, activation, done, begin.source, seed
    )
    figures = bank_figures(spread, spectra, result, done, scheduled) | figures_of_members(artefact, done)
    figures |= figures_of_bytes(config, artefact)
    charts = bank_charts(spectra, joined, artefact)
    report = report_of(config, artefact, bank, result, done, fitting.attempt, figures, charts)
    require_finite(report)
    artefact = replace(artefact, metrics=report.to_dict())
    runtime = watch.runtime(
        result, seconds=time.perf_counter() - clock, experts=bank.sizes.n, read=read, device=run.device
    )
    write_json(run.folder.runtime(key), asdict(runtime))
    write_artefact(artefact, run.folder.bank(key))
    remove_state(run.folder.partial(key))
    run.folder.report(key, BankStatus(State.finished, fitting.attempt, seed, begin.error))
    return Learned(report, runtime, _codes(artefact), fitted=True)


def _read(run: Run, bank: BankPlan, group: ProcessGroup) -> ReadExperts:
    """Read the experts that this process holds."""
    try:
        read = read_experts(
            run.config, run.checkpoint, bank.outline, run.device, group, calibration=run.calibration
        )
    except Exception as error:
        if is_out_of_memory(error):  # no smaller chunk would help
            raise _too_large(run, bank) from error
        raise
    require_range(run.config, read.joined)
    return read


def _fitted(
    run: Run,
    bank: BankPlan,
    read: ReadExperts,
    state: FitState | None,
    watch: Watch,
    seed: int,
    group: ProcessGroup,
) -> tuple[FitResult, Finalised, str]:
    """Fit by the method of the run; return how it went, what is exported, and the activation that holds for it."""
    config, generator = run.config, torch.Generator().manual_seed(seed)
    if config.method in WEIGHT_METHODS:
        assert bank.precision is not None
        done = fit_rounded_weights(read, config, bank.precision, seed=seed)
        return *done, str(Activation.identity)
    if bank.baseline is not None:
        return fit_baseline(read, bank.baseline, config, generator=generator, on_step=watch.step)
    fit = fit_globe(config, bank, read, generator, state, group, watch=watch)
    return *fit, str(config.bank.activation)


def fit_globe(
    config: Config,
    bank: BankPlan,
    read: ReadExperts,
    generator: torch.Generator,
    state: FitState | None,
    group: ProcessGroup,
    *,
    watch: Watch,
) -> tuple[FitResult, Finalised]:
    """Fit one bank and return it with its exported factors; see `fit_bank` and `finalise` for `group`."""
    X = read.joined.experts
    metric = metric_of(config, read, group)
    columns = None
    if metric is not None:
        metric.enter(X)
        columns = metric.kernel(linear=is_linear(config))
    result = fit_bank(
        X,
        bank.sizes,
        fit_options(config, export_dtype=read.export_dtype, precision=bank.precision),
        generator=generator,
        metric=columns,
        resume=state,
        on_step=watch.step,
        on_checkpoint=watch.checkpoint,
        group=group,
    )
    trim_heap()  # of the steps
    if metric is not None:
        metric.leave(X)
        result = replace(result, factors=of_model(metric, result.factors, linear=is_linear(config)))
    done = finalise(
        result.factors,
        read.joined,
        lam=result.lam,
        activation=str(config.bank.activation),
        export_dtype=read.export_dtype,
        prune=config.codes.prune,
        refit=lambda X, M: refit(X, M, lambda_A=result.lambda_A).adapters,
        metric=metric,
        precision=bank.precision,
        group=group,
    )
    return result, done


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _too_large(run: Run, bank: BankPlan) -> _TooLargeError:
    n, p, d = bank.sizes.n, bank.sizes.p, bank.sizes.d
    remedy = "lower model.max_experts, bank.m or bank.r, or use another device"
    if type(run.group) is not Group:
        remedy = "start more processes"
    return _TooLargeError(
        f"{bank.key} ({n} x {p} x {d}) does not fit into the memory of device={run.device.type}: {remedy}"
    )
