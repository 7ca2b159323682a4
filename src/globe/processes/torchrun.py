"""Several processes for one fit, as `torchrun` starts them: how they find each other, what they share, how they end.

All processes run the same fits, each on its own experts. Process 0 leads: it alone has the run folder, so it says what
is learned already and where a fit goes on, and it writes the results. torchrun ends all processes when one of them
ends; what is left to do here is to say why once, and to record it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from globe.config import commands as entry
from globe.config.choices import Dictionary, Method, Seeding
from globe.config.schema import Config
from globe.errors import ConfigError, FitError
from globe.numerics.device import pick_device
from globe.numerics.group import ALONE, ProcessGroup, connected
from globe.runs.folder import State

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another in one exchange: process 0 may hash and write large files in between."""
_GRACE = 3.0
"""Seconds that the main thread has after a signal to end by itself."""
_FAREWELL = 5.0
"""Seconds that a process leaves to the first one of its machine to say what both have to say."""
_WHY, _SAID = "globe/why", "globe/said"
STOPPED = "this fit was stopped, or another process of it was killed: the same command goes on from the last checkpoint"
"""Sentence for a signal, by which torchrun ends the other processes when it loses one."""
SILENT = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
]
"""Options for Hydra in a process that neither owns the run folder nor logs."""


def launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return (
        dist.is_available() and dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    )


def leads() -> bool:
    """Return whether this is the process that writes and speaks: the first of several, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def speaks() -> bool:
    """Return whether this process, the first of a machine, says what goes wrong before the processes have met."""
    return not launched() or os.environ["LOCAL_RANK"] == "0"


def refuse_sweep(arguments: Sequence[str]) -> None:
    """Raise ConfigError for a command line that asks for a sweep, before Hydra makes its folder."""
    if any(one in ("-m", "--multirun") for one in arguments):
        raise ConfigError(
            "a sweep is not possible with several processes of torchrun: start its runs one by one"
        )


def refuse(config: Config) -> None:
    """Raise ConfigError for an option that needs all experts in one process."""
    train, beta = config.train, config.schedule.beta
    for wrong, option, remedy in (
        (config.method is not Method.globe, f"method={config.method}", "method=globe"),
        (config.dry_run, "dry_run=true", "dry_run=false"),
        (config.bank.kept is not None, f"bank.kept={config.bank.kept}", "bank.m and bank.r"),
        (config.bank.size is not None, f"bank.size={config.bank.size}", "bank.m and bank.r"),
        (config.model.size is not None, f"model.size={config.model.size}", "bank.m and bank.r"),
        (config.bank.bits is not None, f"bank.bits={config.bank.bits}", "bank.bits=null"),
        (config.bank.bits_A is not None, f"bank.bits_A={config.bank.bits_A}", "bank.bits_A=null"),
        (config.init.seeding is Seeding.kmeans, "init.seeding=kmeans", "init=group_svd"),
        (train.dictionary is Dictionary.mod, "train.dictionary=mod", "train.dictionary=gauss_newton"),
        (min(beta.start, beta.end) < 1, "schedule.beta below 1", "schedule.beta.start=1 schedule.beta.end=1"),
    ):
        if wrong:
            raise ConfigError(
                f"{option} is not possible with several processes of torchrun: give {remedy}, or start one"
            )


class Group:
    """One process that does all of a run by itself. `Torchrun` is the same over several."""

    leads = True
    """whether this process has the run folder"""
    record: Callable[[State, str | None], None] = staticmethod(lambda state, sentence: None)
    """how the leading process records what ended the run"""

    def share(self, n: int) -> ProcessGroup:
        """Return how n experts are shared out."""
        return ALONE

    def same(self, record: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Return process 0's plain JSON value and tensors, on all processes."""
        return record, tensors

    def in_turn(self, call: Callable[[], T]) -> T:
        """Return what the call gives; process 0 makes it first, the others after it."""
        if self.leads:
            result = call()
        self.same(None, {})
        return result if self.leads else call()

    @contextmanager
    def one_reason(self) -> Iterator[None]:
        """Turn an error that follows from the end of another process into the reason which that one left."""
        yield


class Torchrun(Group):
    """The processes of one fit. Made by the main thread, see `joined`."""

    def __init__(self, device: torch.device, store: dist.Store, rank: int) -> None:
        self.device, self.store, self.leads = device, store, rank == 0
        self.over = threading.Event()
        # the interpreter writes to it by itself, even while the main thread waits inside a library
        self._wakes, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        threading.Thread(target=self._end_after_signal, daemon=True).start()

    def share(self, n: int) -> ProcessGroup:
        return ProcessGroup.of(n, self.device)

    def same(self, record: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        # floats in JSON lose nothing; infinities are written as JSON's relatives in Python are
        head, body = json.dumps(record).encode(), b""
        if self.leads and tensors:
            body = save({name: one.cpu().contiguous().clone() for name, one in tensors.items()})
        head, body = self._broadcast(head), self._broadcast(body)
        return json.loads(head), load(body) if body else {}

    def _broadcast(self, message: bytes) -> bytes:
        size = torch.tensor([len(message)], device=self.device)
        connected(lambda: dist.broadcast(size, 0))
        if not int(size):
            return b""
        if self.leads:
            buffer = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self.device)
        else:
            buffer = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        connected(lambda: dist.broadcast(buffer, 0))
        return buffer.cpu().numpy().tobytes()

    @contextmanager
    def one_reason(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (why := self._why()) is None:
                raise
            raise (KeyboardInterrupt if why == STOPPED else FitError(why)) from error

    def leave(self, sentence: str) -> NoReturn:
        """End this process, and so all of them. The sentence is printed unless another process has said its own."""
        with suppress(RuntimeError):  # the store is gone with the machine that kept it
            if self.store.add(_SAID, 1) == 1:
                entry.say(sentence)
                self.store.set(_WHY, sentence)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # not by an exception: libraries that wait for the others would be taken down under their own threads
        os._exit(entry.INTERRUPTED if sentence == STOPPED else 1)

    def _why(self) -> str | None:
        """Return the reason of the process that ended first, if one left any."""
        try:
            return self.store.get(_WHY).decode() if self.store.check([_WHY]) else None
        except RuntimeError:
            return None

    def _end_after_signal(self) -> None:
        """End this process some time after a signal, if the main thread does not: it may wait inside a library."""
        self._wakes.recv(64)
        if self.over.wait(_GRACE):
            return
        why = self._why() or STOPPED
        if self.leads:
            with suppress(OSError):
                self.record(*((State.interrupted, None) if why == STOPPED else (State.failed, why)))
        self.leave(why)


def own_device(config: Config) -> torch.device:
    """Return the device of this process: cuda:LOCAL_RANK, which becomes the current one, or the CPU.

    Raises ConfigError when there are more processes on this machine than devices, or for an MPS device.
    """
    device = pick_device(config.device, config.dtype)
    if device.type == "mps":
        raise ConfigError("device=mps is not possible with several processes of torchrun: give device=cpu")
    if device.type == "cuda":
        here, count = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > count:  # the same for all processes of this machine, so that its first can say so
            raise ConfigError(
                f"torchrun started {here} processes on a machine with {count} CUDA devices: give "
                f"--nproc-per-node={count}, or device=cpu"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


@contextmanager
def joined(config: Config) -> Iterator[Torchrun]:
    """Yield the group of this process, on its device: by NCCL on CUDA, otherwise by Gloo. Raises as `own_device` does.

    What fails inside ends all processes. That which fails first says why, the others end in silence.
    """
    device = own_device(config)
    store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    # a second connection: one may wait for a process
    told, _, _ = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    group = Torchrun(device, told, rank)
    try:
        with group.one_reason():
            yield group
            connected(dist.barrier)  # all wait, since the first may hold the store
    except KeyboardInterrupt:
        group.leave(STOPPED)
    except Exception as error:
        group.leave(entry.explain(error) or traceback.format_exc())
    group.over.set()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dist.destroy_process_group()


def leave_it_to_the_first(sentence: str) -> None:
    """Leave a sentence to the first process, which has to say it as well, and give it time before torchrun stops it."""
    time.sleep(_FAREWELL)
