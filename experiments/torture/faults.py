"""Disks that fail, memory that runs out, and kills, at every moment of a small run: what is on the disk afterwards?

    python experiments/torture/faults.py             # everything, some minutes
    python experiments/torture/faults.py --short     # one error at each file operation, six kills

- errors: each errno, and MemoryError, raised at each file operation of a run, and of one that repeats a finished run
  with overwrite=true. Held: the run ends well or by one sentence, old or new results are whole, the same command ends
  with the bytes of an undisturbed run.
- allocations: memory that runs out, as torch says it and as Python does, at one operation of tensors or from one on.
  Held: as for errors, but that a fit which went on in smaller chunks may differ by rounding.
- kills: SIGKILL at random moments, a third of the runs twice. Held: the same command ends as above.
- full disks: files may not grow beyond a limit (RLIMIT_FSIZE), in steps up to the largest file. Held: as for errors.
- canaries: files beside the runs, and a user's files inside their folders, are as they were after all of it.
- many fits: runs in one process. Held: memory, open files and threads stay where they were.

Everything happens in a temporary folder of its own, in forks of one process. Exit code 1 unless all held.
"""

from __future__ import annotations

import argparse
import errno
import gc
import hashlib
import itertools
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.utils._python_dispatch import TorchDispatchMode

from globe.config.commands import explain
from globe.config.composition import conf_dir, register
from globe.numerics.device import trim_heap
from globe.train import run

ERRNOS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "EACCES", "EMFILE", "ENOMEM")
OPERATIONS = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "link")
SMALL = (
    "model.max_experts=4",
    "bank.m=2",
    "bank.r=5",
    "train.steps=3",
    "train.checkpoint_every=0",
    "layer=4-5",
)
KEYS = ("layer004.up", "layer005.up")
MOST_GROWTH = 20_000
"""Bytes of resident memory that a run may leave behind, on average over many: less than a thousandth of its own."""


@dataclass
class Part:
    """What was tried and what held, of one kind of fault."""

    name: str
    tried: int = 0
    held: int = 0
    broken: list[str] = field(default_factory=list)
    note: str = ""

    def check(self, what: str, faults: list[str]) -> None:
        self.tried += 1
        self.held += not faults
        self.broken += [f"{what}: {fault}" for fault in faults]


def composed(*overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        return compose("config", overrides=list(overrides))


def quiet_run(node: DictConfig, folder: Path) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        run(node, folder)


def results(folder: Path) -> tuple[str, ...] | None:
    """Digests of the banks; None if one is missing."""
    try:
        files = [folder / "banks" / key / "bank.safetensors" for key in KEYS]
        return tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    except FileNotFoundError:
        return None


def sound(folder: Path, allowed: list[tuple[str, ...]]) -> list[str]:
    """What is wrong with a folder that has to hold one of these results, at the latest in `.repeated`."""
    found = [results(one) for one in (folder, folder / ".repeated")]
    return (
        [] if any(one in allowed for one in found) else ["neither the old results nor the new ones are there"]
    )


@contextmanager
def counting(root: Path, at: int | None, error: BaseException | None) -> Iterator[list[str]]:
    """Note each file operation below `root`, and raise `error` in the place of that number `at`."""
    seen: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            path = args[0]
            own = isinstance(path, int) or str(os.fspath(path)).startswith(str(root))
            if name == "open" and not (args[1] & (os.O_WRONLY | os.O_RDWR)):
                own = False
            if own:
                seen.append(name)
                if error is not None and len(seen) - 1 == at:
                    raise error
            return real(*args, **options)

        return call

    real = {name: getattr(os, name) for name in OPERATIONS}
    try:
        for name in OPERATIONS:
            setattr(os, name, watched(name, real[name]))
        yield seen
    finally:
        for name in OPERATIONS:
            setattr(os, name, real[name])


def error_of(name: str) -> BaseException:
    if name == "MemoryError":
        return MemoryError()
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), "a file")


def errors(root: Path, whole: tuple[str, ...], short: bool, every: int, repeat: Path | None) -> Part:
    """`repeat` is a finished run with other results, which each run repeats with overwrite=true."""
    part = Part("errors at file operations" + ("" if repeat is None else ", overwrite=true"))
    node = composed(*SMALL, *(() if repeat is None else ("overwrite=true",)))
    old = [] if repeat is None else [one for one in [results(repeat)] if one is not None]
    names = itertools.cycle([*ERRNOS, "MemoryError"])
    folder = root / "run"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if repeat is not None:
            shutil.copytree(repeat, folder, symlinks=True)

    prepare()
    with counting(folder, None, None) as seen:
        quiet_run(node, folder)
    operations = list(seen)
    each = [*ERRNOS, "MemoryError"]
    for at, operation in itertools.islice(enumerate(operations), 0, None, every):
        for name in [next(names)] if short or repeat is not None else each:
            prepare()
            faults = []
            with counting(folder, at, error_of(name)):
                try:
                    quiet_run(node, folder)
                except Exception as error:
                    if explain(error) is None:
                        faults.append(f"no sentence for {error!r}")
            if old:
                faults += sound(folder, [*old, whole])
            try:
                quiet_run(node, folder)
            except Exception as error:
                faults.append(f"the same command does not go on: {error!r}")
            else:
                faults += [] if results(folder) == whole else ["other results than undisturbed"]
            part.check(f"{name} at {operation} {at}", faults)
    part.note = f"{len(operations)} operations"
    return part


class NoMemory(TorchDispatchMode):
    """Count operations of tensors, and raise `error` in the place of that number `at`, and of later ones if `on`."""

    def __init__(
        self, at: int | None = None, error: BaseException | None = None, *, on: bool = False
    ) -> None:
        super().__init__()
        self.at, self.error, self.on, self.seen = at, error, on, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.error is not None and self.at is not None:
            number = self.seen - 1
            if number == self.at or (self.on and number > self.at):
                raise self.error
        return func(*args, **(kwargs or {}))


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory: you asked for 9 bytes."
)


def allocations(root: Path, whole: tuple[str, ...], repeat: Path, count: int) -> Part:
    """Let memory run out at `count` operations, spread over a run; every second run repeats `repeat`."""
    part = Part("memory that runs out in tensors")
    fresh, again = composed(*SMALL), composed(*SMALL, "overwrite=true")
    old = results(repeat)
    assert old is not None
    with NoMemory() as counted:
        quiet_run(fresh, root / "counted")
    shutil.rmtree(root / "counted")
    folder = root / "scarce"
    for number in range(count):
        at, repeats, on = counted.seen * number // count, number % 2 == 1, number % 4 < 2
        error = RuntimeError(ALLOCATOR) if number % 3 else MemoryError()
        shutil.rmtree(folder, ignore_errors=True)
        if repeats:
            shutil.copytree(repeat, folder, symlinks=True)
        node, faults, ended = again if repeats else fresh, [], False
        with NoMemory(at, error, on=on):
            try:
                quiet_run(node, folder)
                ended = True
            except Exception as raised:
                if explain(raised) is None:
                    faults.append(f"no sentence for {raised!r}")
        if repeats and not ended:
            faults += sound(folder, [old])
        faults += ["it ended well without memory"] if ended and on else []
        try:
            quiet_run(node, folder)
        except Exception as raised:
            faults.append(f"the same command does not go on: {raised!r}")
        found = results(folder)
        faults += (
            [] if found is not None and (found == whole or not on) else ["other results than undisturbed"]
        )
        part.check(f"{type(error).__name__} {'from' if on else 'at'} operation {at}", faults)
    part.note = f"{counted.seen} operations"
    return part


def in_fork(job: Callable[[], int]) -> int:
    """Start a job in a fork; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = job()
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
    os._exit(code)


def job_of(node: DictConfig, folder: Path) -> Callable[[], int]:
    def job() -> int:
        try:
            quiet_run(node, folder)
        except Exception as error:
            return 1 if explain(error) is not None else 2
        return 0

    return job


def kills(root: Path, whole: tuple[str, ...], repeat: Path, count: int, draw: random.Random) -> Part:
    part = Part("kills at random moments")
    again = composed(*SMALL, "overwrite=true")
    fresh = composed(*SMALL)
    old = results(repeat)
    assert old is not None
    took = 1.0
    for number in range(count):
        folder, repeats = root / f"killed-{number}", number % 2 == 1
        if repeats:
            shutil.copytree(repeat, folder, symlinks=True)
        node, faults, times = again if repeats else fresh, [], 2 if number % 3 == 0 else 1
        for _ in range(times):
            child = in_fork(job_of(node, folder))
            time.sleep(draw.uniform(0, took))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if repeats:
                faults += sound(folder, [old, whole])
        started = time.monotonic()
        _, status = os.waitpid(in_fork(job_of(node, folder)), 0)
        if not number:
            took = time.monotonic() - started
        code = os.waitstatus_to_exitcode(status)
        faults += [] if code == 0 else [f"the same command ended with {code}"]
        faults += [] if results(folder) == whole else ["other results than undisturbed"]
        part.check(f"kill {number}", faults)
        shutil.rmtree(folder)
    part.note = f"{sum(2 if number % 3 == 0 else 1 for number in range(count))} kills"
    return part


def full_disks(root: Path, whole: tuple[str, ...], repeat: Path, steps: int) -> Part:
    part = Part("full disks (RLIMIT_FSIZE)")
    largest = max(file.stat().st_size for file in repeat.rglob("*") if file.is_file())
    old = results(repeat)
    assert old is not None
    for step in range(steps):
        limit = largest * step // steps
        for repeats in (False, True):
            folder = root / "full"
            shutil.rmtree(folder, ignore_errors=True)
            if repeats:
                shutil.copytree(repeat, folder, symlinks=True)
            node = composed(*SMALL, *(("overwrite=true",) if repeats else ()))

            def limited(node: DictConfig = node, folder: Path = folder, limit: int = limit) -> int:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                return job_of(node, folder)()

            code = os.waitstatus_to_exitcode(os.waitpid(in_fork(limited), 0)[1])
            faults = [] if code in (0, 1) else [f"no sentence (exit code {code})"]
            if repeats:
                faults += sound(folder, [old, whole])
            code = os.waitstatus_to_exitcode(os.waitpid(in_fork(job_of(node, folder)), 0)[1])
            faults += [] if code == 0 else [f"the same command ended with {code}"]
            faults += [] if results(folder) == whole else ["other results than undisturbed"]
            part.check(f"limit {limit}{', overwrite=true' if repeats else ''}", faults)
    return part


def plant(folder: Path) -> dict[Path, str]:
    """Put files next to what runs write, and return their digests."""
    texts = {
        folder / "canary" / "config.yaml": "mine: ${oc.env:HOME}\n",
        folder / "canary" / "banks" / "layer004.up" / "bank.safetensors": "not a bank",
        folder / ".backup-20240131" / "file": "a backup",
        folder / ".status.json.deadbeef": "not ours",
        folder / "fig-front.png": "a picture",
    }
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "link").symlink_to(folder / "canary" / "config.yaml")
    return {file: file.read_text() for file in texts}


def canaries(planted: dict[Path, str]) -> Part:
    part = Part("canaries")
    for file, text in planted.items():
        part.check(str(file), [] if file.is_file() and file.read_text() == text else ["it was changed"])
    return part


def resident() -> int:
    gc.collect()
    trim_heap()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def many_fits(root: Path, count: int) -> Part:
    part = Part(f"{count} fits in one process")
    nodes = [composed(*SMALL[:-1], "layer=4", f"seed={seed}") for seed in range(count)]
    folder = root / "many"

    def one(node: DictConfig) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        quiet_run(node, folder)

    settled = max(5, count // 4)
    for node in nodes[:settled]:
        one(node)
    before = (
        resident(),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(logging.getLogger().handlers),
    )
    for node in nodes[settled:]:
        one(node)
    after = (
        resident(),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(logging.getLogger().handlers),
    )
    growth = (after[0] - before[0]) / (count - settled)
    part.check("memory", [] if growth <= MOST_GROWTH else [f"{growth:,.0f} bytes a run"])
    for name, old, new in zip(("open files", "threads", "log handlers"), before[1:], after[1:], strict=True):
        part.check(name, [] if new <= old else [f"{old} before, {new} after"])
    part.note = f"{growth:,.0f} bytes a run"
    return part


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="under two minutes")
    parser.add_argument("--kills", type=int, help="runs that are killed; default 60, or 6")
    parser.add_argument("--fits", type=int, help="fits in one process; default 200, or 24")
    parser.add_argument("--every", type=int, default=1, help="fail only each so many-th file operation")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    options = parser.parse_args()
    short, draw = options.short, random.Random(options.seed)
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="globe-torture-") as name:
        root = Path(name).resolve()
        planted = plant(root)
        quiet_run(composed(*SMALL), root / "whole")
        whole = results(root / "whole")
        assert whole is not None
        old = root / "old"
        quiet_run(composed(*SMALL, "seed=1"), old)
        (old / "NOTES.md").write_text("mine")
        parts = [
            errors(root, whole, short, options.every, None),
            errors(root, whole, short, options.every, old),
            allocations(root, whole, old, 6 if short else 60),
            kills(root, whole, old, options.kills or (6 if short else 60), draw),
            full_disks(root, whole, old, 4 if short else 20),
            many_fits(root, options.fits or (24 if short else 200)),
            canaries(planted),
        ]
    print("| fault | tried | held | |")
    print("|---|---|---|---|")
    for part in parts:
        print(f"| {part.name} | {part.tried} | {part.held} | {part.note} |")
    for line in [line for part in parts for line in part.broken][:40]:
        print(line)
    return 0 if all(part.held == part.tried for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
