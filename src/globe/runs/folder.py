"""The folder of one run: what is in it, how far the run is, and who holds it. Every write is atomic.

Nothing is removed or replaced in a folder but what is listed here, and only in a folder of a run (`status.json`).

config.yaml     the composed, resolved configuration
metrics.jsonl   one flat JSON object per step and bank
frontier.json   the search for sizes, with bank.kept; calibration.json what calibrate.text gave
summary.json    the figures of all finished banks
status.json     state, times, error, and the same for every bank
train.log       the log
banks/KEY/      the artefact of a bank; KEY.json its run time; KEY.partial/ an unfinished fit
.lock           held while a process works on the run
.repetition/    results of overwrite=true until they are whole, a run folder of its own
.repeated/      the same on its way into the place of the old results, which go to .replaced/
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

import yaml

from globe.errors import ArtefactError, ConfigError
from globe.files import (
    clear_files,
    clear_folders,
    lock,
    plain_record,
    read_as,
    require_replaceable,
    write_json,
    write_text,
)

_LOG_LINE = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
_RESULTS = (
    "banks",
    "metrics.jsonl",
    "frontier.json",
    "calibration.json",
    "config.yaml",
    "summary.json",
    "status.json",
)
"""Entries that a repetition replaces, in this order: a run counts as finished by the last one."""


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
        self.log_file = self.path / "train.log"
        self.banks = self.path / "banks"
        self.status = read_as(Status, self.status_file)

    def bank(self, key: str) -> Path:
        """Return the folder of a bank's artefact."""
        return self.banks / key

    def partial(self, key: str) -> Path:
        """Return the folder of the checkpoint of a bank's unfinished fit."""
        return self.banks / f"{key}.partial"

    def runtime(self, key: str) -> Path:
        """Return the file of a bank's times and memory, the figures that differ between equal runs."""
        return self.banks / f"{key}.json"

    def _files(self) -> tuple[Path, ...]:
        return self.config_file, self.summary_file, self.status_file, self.metrics_file, self.frontier_file

    def require_own(self) -> None:
        """Raise ConfigError if something else than a run is here, in which a run would lose or mix up files.

        Of a run that was killed before it had a `status.json` there are at most a lock and an empty folder.
        """
        if self.status is not None or not os.path.lexists(self.path):
            return
        if read_as(Status, self.path / ".repeated" / "status.json") is not None:
            return  # cut off by a kill where results change places
        if not self.path.is_dir():
            raise ConfigError(
                f"{self.path} is a file: give another folder for the run (hydra.run.dir or output)"
            )
        for one in self.path.iterdir():
            begun = one.name == ".lock" or re.fullmatch(r"\.status\.json\.globe-[0-9a-f]{8}", one.name)
            if not begun and not (one == self.banks and one.is_dir() and not any(one.iterdir())):
                raise ConfigError(
                    f"{self.path} holds {one.name} and is no folder of a run: give an empty or a new folder "
                    "(hydra.run.dir or output)"
                )

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Append what is logged to `train.log`; raises ConfigError if that is a link or a device."""
        stream = open_to_append(self.log_file)
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(_LOG_LINE))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            with suppress(OSError):  # a full disk, which has ended the run by a sentence already
                stream.close()

    @contextmanager
    def recorded(self, explain: Callable[[BaseException], str | None]) -> Iterator[None]:
        """Record how what is done inside ends; `explain` gives the sentence for an error, or None.

        A finished run stays finished: what failed then did not touch it.
        """
        try:
            yield
            if self.status is not None and self.status.state is State.running:
                self.finish()
        except BaseException as error:
            if self.status is None or self.status.state is not State.finished:
                sentence = explain(error) or f"{type(error).__name__}: {error}"
                # a scheduler's signal ends with it
                stopped = isinstance(error, KeyboardInterrupt | SystemExit)
                with suppress(OSError, ValueError):  # the disk may be what is wrong
                    self.end(State.interrupted if stopped else State.failed, None if stopped else sentence)
            raise

    def begin(self, config: dict[str, Any]) -> None:
        """Mark the run as running and write its configuration; banks that were reported before stay so.

        What a killed process was writing just then is removed; call it in `held`, where no other process writes.
        Raises ConfigError as `require_own` does.
        """
        self.require_own()
        self.banks.mkdir(parents=True, exist_ok=True)
        banks = self.status.banks if self.status else {}
        clear_folders(self.banks)
        clear_files([*self._files(), *map(self.runtime, banks)])
        self._write_status(Status(State.running, _now(), banks=banks))
        # the values are plain: whoever reads them has no interpolation to resolve
        write_text(self.config_file, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def finish(self) -> None:
        """Record that all went well. Raises ArtefactError if banks are no longer there."""
        assert self.status is not None
        done = [key for key, bank in self.status.banks.items() if bank.state is State.finished]
        lost = [key for key in done if not (self.bank(key) / "bank.safetensors").is_file()]
        if lost or not self.config_file.is_file():
            raise ArtefactError(
                f"{self.path} was removed or changed while the run went on ({', '.join(lost) or 'config.yaml'} is "
                "missing): the same command learns again what is not there"
            )
        self.end(State.finished)

    def repetition(self) -> RunFolder:
        """Return the folder for the results of `overwrite=true`; what a killed repetition left there is used."""
        return RunFolder(self.path / ".repetition")

    def take_repetition(self) -> None:
        """Put the results of a finished repetition in the place of the old ones, or go on where a kill cut that off.

        Before the first rename there are the old results; after it the new ones are whole in `.repeated`, from which
        this, called by whoever holds the run next, moves what is not in its place yet.
        """
        ready, aside = self.path / ".repeated", self.path / ".replaced"
        repetition = self.repetition()
        done = repetition.status is not None and repetition.status.state is State.finished
        if not ready.is_dir() and not done:
            return
        if not ready.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(repetition.path, ready)
        aside.mkdir(exist_ok=True)
        names = [name for name in _RESULTS if os.path.lexists(ready / name)]
        if "banks" in names:  # nothing is moved yet, so that what the new results lack is of the old ones
            for name in set(_RESULTS) - set(names):
                if os.path.lexists(self.path / name):
                    os.rename(self.path / name, aside / name)
        for name in names:
            if not os.path.lexists(aside / name) and os.path.lexists(self.path / name):
                os.rename(self.path / name, aside / name)
            os.rename(ready / name, self.path / name)
        self._keep_what_is_not_ours(aside)
        shutil.rmtree(ready)
        shutil.rmtree(aside)
        self.status = read_as(Status, self.status_file)

    def _keep_what_is_not_ours(self, aside: Path) -> None:
        """Move back into `banks` what a user has put beside the banks of the old results."""
        old = read_as(Status, aside / "status.json")
        ours = {name for key in (old.banks if old else {}) for name in (key, f"{key}.json", f"{key}.partial")}
        for one in (aside / "banks").iterdir() if (aside / "banks").is_dir() else ():
            if one.name not in ours and not os.path.lexists(self.banks / one.name):
                os.rename(one, self.banks / one.name)

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


def open_to_append(path: Path) -> TextIO:
    """Open a UTF-8 text file to write at its end. Raises ConfigError for a link or a device, OSError otherwise."""
    require_replaceable(path)
    flags = (
        os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    )
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8")


def _keeps(line: str, key: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return line.endswith("\n") and (record["bank"] != key or record["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
