"""Several processes for one fit, as `torchrun` starts them: how they find each other, talk, and end together.

The first process (rank 0) leads: it owns the run folder, and tells the others which bank is next. A process that fails
leaves its sentence in the store that all of them reach; a thread in every process looks there and ends it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from globe.am.ranks import Sharded, connected
from globe.am.records import FitState
from globe.config import Config, Dictionary, Method, Seeding
from globe.device import pick_device
from globe.errors import ConfigError

_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another in one exchange: rank 0 may hash and write large files in between."""
_LOOK_EVERY = 0.2
_FAREWELL = 10.0
"""Seconds between two looks for a failure, and those that a failed process gives rank 0 to record it."""
SILENT = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
]
"""What Hydra is told in a process that neither owns the run folder nor logs."""
_FAILED, _RECORDED, _FIRST = "globe/failed", "globe/recorded", "globe/first"


@dataclass(frozen=True, slots=True)
class Order:
    """The next bank to learn."""

    key: str
    seed: int
    state: FitState | None
    """where its fit goes on"""


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return (
        dist.is_available() and dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    )


def leads() -> bool:
    """Whether this is the process that writes and speaks: the first of several, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def refuse(config: Config) -> None:
    """Raises ConfigError for an option that needs all experts in one process."""
    train, beta = config.train, config.schedule.beta
    for wrong, option, remedy in (
        (config.method is not Method.globe, f"method={config.method}", "method=globe"),
        (config.dry_run, "dry_run=true", "dry_run=false"),
        (config.bank.kept is not None, f"bank.kept={config.bank.kept}", "bank.m and bank.r"),
        (config.init.seeding is Seeding.kmeans, "init.seeding=kmeans", "init=group_svd"),
        (train.dictionary is Dictionary.mod, "train.dictionary=mod", "train.dictionary=gauss_newton"),
        (min(beta.start, beta.end) < 1, "schedule.beta below 1", "schedule.beta.start=1 schedule.beta.end=1"),
    ):
        if wrong:
            raise ConfigError(
                f"{option} is not possible with several processes of torchrun: give {remedy}, or start one"
            )


class Group:
    """The processes of one fit. Make it by `joined`."""

    def __init__(self, device: torch.device, store: dist.Store) -> None:
        self.device, self.store = device, store
        self.rank = dist.get_rank()
        self.on_failure: Callable[[str], None] = lambda sentence: None
        """what rank 0 does with the sentence of another process that failed"""
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def ranks(self, n: int) -> Sharded:
        """How n experts are shared out."""
        return Sharded.of(n, self.device)

    def tell(self, order: Order | None) -> None:
        """Rank 0: what is to be learned next; None ends the run."""
        head, tensors = b"null", b""
        if order is not None:
            state = order.state
            # floats in JSON lose nothing; infinities are written as JSON's relatives in Python are
            numbers = None if state is None else state.numbers
            head = json.dumps({"key": order.key, "seed": order.seed, "numbers": numbers}).encode()
            if state is not None:
                tensors = save({name: one.cpu().contiguous().clone() for name, one in state.tensors.items()})
        for part in (head, tensors):
            self._exchange(part)

    def hear(self) -> Order | None:
        """Other ranks: what rank 0 tells."""
        order, tensors = json.loads(self._exchange(b"")), self._exchange(b"")
        if order is None:
            return None
        state = FitState(load(tensors), order["numbers"]) if order["numbers"] is not None else None
        return Order(order["key"], order["seed"], state)

    def _exchange(self, message: bytes) -> bytes:
        size = torch.tensor([len(message)], device=self.device)
        connected(lambda: dist.broadcast(size, 0))
        if not int(size):
            return b""
        if self.rank == 0:
            buffer = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(self.device)
        else:
            buffer = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        connected(lambda: dist.broadcast(buffer, 0))
        return buffer.cpu().numpy().tobytes()

    def fail(self, sentence: str) -> bool:
        """Tell all processes that this one ends. True if it is the first: its sentence is the one to print."""
        first = False
        with suppress(RuntimeError):  # the store may be gone with the process that ended
            first = self.store.add(_FIRST, 1) == 1
            if first:
                self.store.set(_FAILED, sentence)
                if self.rank == 0:
                    self.store.set(_RECORDED, "")
                else:
                    self.store.wait([_RECORDED], timedelta(seconds=_FAREWELL))
        self._done.set()
        return first

    def part(self) -> None:
        """All is done: wait until every process knows, since rank 0 may hold the store."""
        self._done.set()
        self._watch.join()
        connected(dist.barrier)

    def _look(self) -> None:
        """Ends this process when another has failed: its own main thread may wait for that one in vain."""
        while not self._done.wait(_LOOK_EVERY):
            try:
                if not self.store.check([_FAILED]):
                    continue
                sentence = self.store.get(_FAILED).decode()
            except RuntimeError:
                return  # the first process is gone, which the next exchange says as well
            if self._done.is_set():
                return
            if self.rank == 0:
                with suppress(OSError):
                    self.on_failure(sentence)
                with suppress(RuntimeError):
                    self.store.set(_RECORDED, "")
            logging.shutdown()
            sys.stderr.flush()
            os._exit(1)


@contextmanager
def joined(config: Config) -> Iterator[Group]:
    """The group of this process, on its device: cuda:LOCAL_RANK with nccl, the CPU with gloo.

    Raises ConfigError when there are more processes than devices.
    """
    device = pick_device(config.device, config.dtype)
    if device.type == "mps":
        raise ConfigError("device=mps is not possible with several processes of torchrun: give device=cpu")
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ConfigError(
                f"torchrun started a process number {local + 1} on a machine with {count} CUDA devices: give "
                f"--nproc-per-node={count}, or device=cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    watched, _, _ = next(dist.rendezvous("env://", timeout=_TIMEOUT))  # a second connection, for the thread
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    group = Group(device, watched)
    yield group
    group.part()  # not after a failure, where the others do not come
    dist.destroy_process_group()
