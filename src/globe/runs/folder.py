"""The folder of one run: what is in it, how far the run is, and who holds it. Every write is atomic.

config.yaml     the composed, resolved configuration
metrics.jsonl   one flat JSON object per step and bank
frontier.json   the search for sizes, with bank.kept
summary.json    the figures of all finished banks
status.json     state, times, error, and the same for every bank
train.log       the log, by Hydra
banks/KEY/      the artefact of a bank; KEY.json its run time; KEY.partial/ an unfinished fit
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from globe.errors import ConfigError
from globe.files import (
    clear_files,
    clear_folders,
    lock,
    parse_record,
    plain_record,
    read_record,
    write_json,
    write_text,
)

_log = logging.getLogger(__name__)


class State(StrEnum):
    running = "running"
    finished = "finished"
    failed = "failed"
    interrupted = "interrupted"


@dataclass(frozen=True, slots=True)
class BankStatus:
    state: State
    attempt: int = 0
    """0 for the first try, 1 after a failure, with another seed"""
    seed: int | None = None
    """of the bank's random generator"""
    error: str | None = None
    """why the bank failed, or why its first try did"""


@dataclass(frozen=True, slots=True)
class Status:
    state: State
    started: str
    ended: str | None = None
    error: str | None = None
    banks: dict[str, BankStatus] = field(default_factory=dict)


class RunFolder:
    """Paths, status and summary of a run. `status` is what this process last wrote, or found."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.frontier_file = self.path / "frontier.json"
        self.status_file = self.path / "status.json"
        self.banks = self.path / "banks"
        self.status = _parse_status(read_record(self.status_file))

    def bank(self, key: str) -> Path:
        """Where the artefact of a bank goes."""
        return self.banks / key

    def partial(self, key: str) -> Path:
        """Where the checkpoint of a bank's unfinished fit goes."""
        return self.banks / f"{key}.partial"

    def runtime(self, key: str) -> Path:
        """Where the times and memory of a bank go: figures that differ between equal runs."""
        return self.banks / f"{key}.json"

    def _files(self) -> tuple[Path, ...]:
        return self.config_file, self.summary_file, self.status_file, self.metrics_file, self.frontier_file

    @contextmanager
    def recorded(self, explain: Callable[[BaseException], str | None]) -> Iterator[None]:
        """Record how what is done inside ends; `explain` gives the sentence for an error, or None.

        A finished run that could not even be reported (an option that has no part in its name was wrong)
        stays finished.
        """
        try:
            yield
        except BaseException as error:
            if self.status is None or self.status.state is not State.finished:
                sentence = explain(error) or f"{type(error).__name__}: {error}"
                stopped = isinstance(
                    error, KeyboardInterrupt | SystemExit
                )  # a scheduler's signal ends with it
                with suppress(OSError):  # the disk may be what is wrong
                    self.end(State.interrupted if stopped else State.failed, None if stopped else sentence)
            raise
        if self.status is not None and self.status.state is State.running:
            self.end(State.finished)

    def begin(self, config: dict[str, Any]) -> None:
        """Mark the run as running and write its configuration; banks that were reported before stay so.

        What a killed process was writing just then is removed; call it in `held`, where no other process writes.
        """
        self.banks.mkdir(parents=True, exist_ok=True)
        banks = self.status.banks if self.status else {}
        clear_folders(self.banks)
        clear_files([*self._files(), *map(self.runtime, banks)])
        self._write_status(Status(State.running, _now(), banks=banks))
        write_text(self.config_file, OmegaConf.to_yaml(OmegaConf.create(config)))

    def clear(self) -> None:
        """Forget all results. The summary goes first: a run without one does not count as finished."""
        for file in self._files()[1:]:
            file.unlink(missing_ok=True)
        shutil.rmtree(self.banks, ignore_errors=True)
        self.status = None

    def report(self, key: str, bank: BankStatus) -> None:
        """Record how far a bank is."""
        assert self.status is not None
        self._write_status(replace(self.status, banks=self.status.banks | {key: bank}))

    def end(self, state: State, error: str | None = None) -> None:
        """Record how the run ended; a bank that was running shares its fate."""
        status = self.status or Status(State.running, _now())
        banks = {
            key: replace(bank, state=state) if bank.state is State.running else bank
            for key, bank in status.banks.items()
        }
        self._write_status(replace(status, state=state, ended=_now(), error=error, banks=banks))

    def _write_status(self, status: Status) -> None:
        self.status = status
        write_json(self.status_file, plain_record(status))

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.summary_file, summary)

    def rewind_metrics(self, key: str, step: int) -> None:
        """Drop a bank's lines after `step`, which a resumed fit takes again, and a line cut by a kill."""
        try:
            lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return
        kept = [line for line in lines if _keeps(line, key, step)]
        if kept != lines:
            write_text(self.metrics_file, "".join(kept))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder against another process with the same command; a kill lets go of it.

        Raises ConfigError if another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with lock(self.path / ".lock"):
                yield
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.path} is in use by another process: wait for it, or give another output folder"
            ) from error


def _parse_status(record: dict[str, Any] | None) -> Status | None:
    if record is None:
        return None
    try:
        return parse_record(Status, record)
    except ValueError:
        _log.warning("a status.json of another version is ignored")
        return None


def _keeps(line: str, key: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return line.endswith("\n") and (record["bank"] != key or record["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
