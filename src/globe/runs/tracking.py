"""The trackers of a run: `metrics.jsonl` always, wandb when asked for. No other file imports wandb.

A sink is three methods. Another tracker is one more class here, and one more line in `open_sinks`. A tracker is worked
by a thread of its own (`Background`) and may fail (`Guarded`): no step waits for it, and no run ends with it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from globe.config.choices import WandbMode
from globe.config.schema import WandbConfig
from globe.runs.folder import open_to_append

Scalar = float | int | bool | str | None

_SHARE = 0.02
"""Share of the processor time of one core that a tracker may take while a fit runs."""
_IDLE = 0.5
"""Seconds between two looks for something to tell."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The facts about a run that a sink gets when it opens."""

    name: str
    folder: Path
    config: dict[str, Any]
    """The composed configuration, plain and nested; the resolved sizes of each bank under `sizes`; and the keys that
    sweeps are read by, `m`, `r` and `target_support` as numbers (lists where banks differ) beside `S_cache`."""
    banks: tuple[str, ...]
    sweep: str | None
    """Name of the sweep the run belongs to; None for a run on its own."""
    results: Path | None = None
    """Folder in which `banks/` is meanwhile, if that is not `folder`."""


@runtime_checkable
class Sink(Protocol):
    def open(self, run: RunInfo) -> None: ...

    def log(self, bank: str, step: int, values: Mapping[str, Scalar]) -> None:
        """Take the figures of one step of one bank."""

    def finish(self, summary: Mapping[str, Any], *, state: str) -> None:
        """Take the run's summary as in `summary.json`, possibly of the finished banks only, and how it ended."""


class JsonlSink:
    """One flat JSON object per step and bank, one a line. A number that is not finite becomes null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, run: RunInfo) -> None:
        open_to_append(self.path).close()

    def log(self, bank: str, step: int, values: Mapping[str, Scalar]) -> None:
        record = {"bank": bank} | {key: _finite(value) for key, value in values.items()} | {"step": step}
        # opened for each line: a resumed fit rewrites the file, and a kill may come at any time
        with open_to_append(self.path) as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def finish(self, summary: Mapping[str, Any], *, state: str) -> None:
        """Do nothing: `summary.json` stands beside this file."""


class WandbSink:
    """A wandb run. Never asks for a key: without one, an online run is kept offline beside the run.

    With several banks every figure is prefixed with the bank's key. The step is ours (`step`), since a run
    that wandb resumes starts counting anew.
    """

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self.run: Any = None
        self.info: RunInfo | None = None
        self.prefix: dict[str, str] = {}

    def open(self, run: RunInfo) -> None:
        import wandb

        mode: Literal["offline", "online"] = "offline" if self.config.mode is WandbMode.offline else "online"
        if mode == "online" and not wandb.login(prompt=False):
            _log.warning("wandb has no API key: this run stays offline in %s, sync it later", run.folder)
            mode = "offline"
        try:
            self.run = self._init(run, mode)
        except Exception as error:
            if mode == "offline":
                raise
            _log.warning("wandb is out of reach (%s): this run stays offline in %s", _line(error), run.folder)
            self.run = self._init(run, "offline")
        self.info, several = run, len(run.banks) > 1
        self.prefix = {bank: f"{bank}/" if several else "" for bank in run.banks}
        for prefix in self.prefix.values():
            self.run.define_metric(f"{prefix}step", hidden=True)
            self.run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
            for figure in ("relfrob", "validation_relfrob", "objective"):
                self.run.define_metric(f"{prefix}{figure}", step_metric=f"{prefix}step", summary="min")

    def _init(self, run: RunInfo, mode: Literal["offline", "online"]) -> Any:
        import wandb

        return wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            group=self.config.group or run.sweep,
            job_type=self.config.job_type,
            tags=self.config.tags,
            name=run.name,
            config=run.config,
            dir=run.folder,
            mode=mode,
            id=secrets.token_hex(4),  # one of the environment would be that of all runs of a sweep
            reinit="finish_previous",
            # silent and without the console: our own log says it, and a wrapped console breaks the bar
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )

    def log(self, bank: str, step: int, values: Mapping[str, Scalar]) -> None:
        if step % self.config.log_every == 0:
            prefix = self.prefix[bank]
            figures = {key: value for key, value in values.items() if value is not None}
            self.run.log({f"{prefix}{key}": value for key, value in (figures | {"step": step}).items()})

    def finish(self, summary: Mapping[str, Any], *, state: str) -> None:
        import wandb

        if self.run is None:  # never opened
            return
        histograms = {}
        for bank in summary["banks"]:
            prefix = self.prefix.get(bank["key"], "")
            figures = {key: value for key, value in bank.items() if isinstance(value, float | int | str)}
            figures |= {f"final/{key}": value for key, value in _flat(bank.get("metrics", {})).items()}
            self.run.summary.update({f"{prefix}{key}": value for key, value in figures.items()})
            if bank.get("supports"):
                histograms[f"{prefix}supports"] = wandb.Histogram(bank["supports"])
        if histograms:
            self.run.log(histograms)
        self.run.summary.update(
            {f"run/{key}": value for key, value in summary.items() if isinstance(value, float | int | str)}
        )
        if self.config.log_artifact:
            for bank in summary["banks"]:
                self._log_artifact(bank)
        self.run.finish(exit_code=0 if state == "finished" else 1)

    def _log_artifact(self, bank: Mapping[str, Any]) -> None:
        import wandb

        assert self.info is not None
        # wandb allows letters, digits and three signs in a name, 128 of them
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{self.info.name[-80:]}.{bank['key']}")[:128]
        figures = {key: bank[key] for key in ("relfrob", "kept", "m", "r") if key in bank}
        artifact = wandb.Artifact(name, type="bank", metadata=figures)
        artifact.add_dir(str((self.info.results or self.info.folder) / "banks" / bank["key"]))
        self.run.log_artifact(artifact)


class Guarded:
    """A sink that may fail without harm: the first failure is logged as a warning, then it is left alone."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.failed = False

    def open(self, run: RunInfo) -> None:
        self._try("open", run)

    def log(self, bank: str, step: int, values: Mapping[str, Scalar]) -> None:
        self._try("log", bank, step, values)

    def finish(self, summary: Mapping[str, Any], *, state: str) -> None:
        self._try("finish", summary, state=state)

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self.failed:
            return
        try:
            getattr(self.sink, method)(*args, **kwargs)
        except Exception as error:  # whatever a tracker does, the fit goes on
            self.failed = True
            name = type(self.sink).__name__
            _log.warning("%s failed to %s (%s): the run goes on without it", name, method, _line(error))


class Background:
    """A sink that a thread of its own works: a call costs the fit the time of putting it into a list.

    Python runs one thread at a time, so the sink is paced as well: between two calls of `log` its thread rests until
    the processor time of the last one is a fiftieth of all. What is left when the run ends is told without a rest, and
    `finish` waits `patience` seconds for it before the sink is given up, with a warning. Of more than `capacity` calls
    that wait, further ones are dropped and counted. Give it a sink that does not raise (`Guarded`).
    """

    def __init__(self, sink: Sink, *, patience: float, capacity: int = 100_000) -> None:
        self.sink, self.patience, self.capacity = sink, patience, capacity
        self.dropped = 0
        self._calls: deque[tuple[str, tuple[Any, ...], dict[str, Any]]] = deque()
        self._ending = threading.Event()
        # a daemon, so that a sink that hangs does not keep the process
        self._thread = threading.Thread(target=self._work, daemon=True, name="globe-tracking")

    def open(self, run: RunInfo) -> None:
        self._calls.append(("open", (run,), {}))
        self._thread.start()

    def log(self, bank: str, step: int, values: Mapping[str, Scalar]) -> None:
        # it wakes nobody: a switch of threads may cost a turn on a busy core
        if len(self._calls) < self.capacity:
            self._calls.append(("log", (bank, step, values), {}))
        else:
            self.dropped += 1

    def finish(self, summary: Mapping[str, Any], *, state: str) -> None:
        if not self._thread.is_alive():  # it was never opened
            return
        self._calls.append(("finish", (summary,), {"state": state}))
        self._ending.set()
        self._thread.join(self.patience)
        if self._thread.is_alive():
            _log.warning("the tracker is not done after %g s: the run goes on without it", self.patience)
        if self.dropped:
            _log.warning("the tracker was too slow for %d points: metrics.jsonl has them", self.dropped)

    def _work(self) -> None:
        method = ""
        while method != "finish":
            if not self._calls:
                self._ending.wait(_IDLE)
                continue
            method, args, kwargs = self._calls.popleft()
            clock = time.thread_time()
            getattr(self.sink, method)(*args, **kwargs)
            if method == "log":
                self._ending.wait((1 / _SHARE - 1) * (time.thread_time() - clock))


class Fanout:
    """Pass everything on to several sinks."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def open(self, run: RunInfo) -> None:
        for sink in self.sinks:
            sink.open(run)

    def log(self, bank: str, step: int, values: Mapping[str, Scalar]) -> None:
        for sink in self.sinks:
            sink.log(bank, step, values)

    def finish(self, summary: Mapping[str, Any], *, state: str) -> None:
        for sink in self.sinks:
            sink.finish(summary, state=state)


def open_sinks(config: WandbConfig, metrics: Path, run: RunInfo) -> Fanout:
    """Return the sinks of a run, open. Only the file beside the run may raise (OSError: the disk is full)."""
    sinks: list[Sink] = [JsonlSink(metrics)]
    if config.mode is not WandbMode.disabled:
        sinks.append(Background(Guarded(WandbSink(config)), patience=config.patience))
    together = Fanout(sinks)
    together.open(run)
    return together


def _finite(value: Scalar) -> Scalar:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: Mapping[str, Any]) -> dict[str, float | int | str]:
    return {key: value for key, value in values.items() if isinstance(value, float | int | str)}


def _line(error: Exception) -> str:
    """Return type and first line of an error: the messages of trackers run over many lines."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
