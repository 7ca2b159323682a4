"""Several processes for one fit, as `torchrun` starts them: how they find each other and talk; `ending`: how they end.

The first process (process 0) leads: it owns the run folder, and tells the others which bank is next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from globe.am.records import FitState
from globe.config.choices import Dictionary, Method, Seeding
from globe.config.schema import Config
from globe.errors import ConfigError
from globe.numerics.device import pick_device
from globe.numerics.group import ShardedGroup, connected
from globe.processes.joint_end import Ending

_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another in one exchange: process 0 may hash and write large files in between."""
SILENT = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
]
"""What Hydra is told in a process that neither owns the run folder nor logs."""


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


def speaks() -> bool:
    """Whether this process says what goes wrong before the processes know of each other: the first of a machine."""
    return not launched() or os.environ["LOCAL_RANK"] == "0"


def refuse_sweep(arguments: Sequence[str]) -> None:
    """Raises ConfigError for a command line that asks for a sweep, before Hydra makes its folder."""
    if any(one in ("-m", "--multirun") for one in arguments):
        raise ConfigError(
            "a sweep is not possible with several processes of torchrun: start its runs one by one"
        )


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

    def __init__(self, device: torch.device, ending: Ending) -> None:
        self.device, self.ending = device, ending
        self.rank = dist.get_rank()

    def share(self, n: int) -> ShardedGroup:
        """How n experts are shared out."""
        return ShardedGroup.of(n, self.device)

    def tell(self, order: Order | None) -> None:
        """Process 0: what is to be learned next; None ends the run."""
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
        """Other processes: what process 0 tells."""
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


def own_device(config: Config) -> torch.device:
    """Of this process: cuda:LOCAL_RANK, which becomes the current one, or the CPU.

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
def joined(config: Config) -> Iterator[Group]:
    """The group of this process, on its device: by NCCL on CUDA, otherwise by Gloo. Raises as `own_device` does."""
    device = own_device(config)
    store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    watched, _, _ = next(dist.rendezvous("env://", timeout=_TIMEOUT))  # a second connection, for the thread
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    group = Group(device, Ending(watched, rank))
    yield group
    # not after a failure, where the others do not come; all wait here, since the first may hold the store
    connected(dist.barrier)
    group.ending.close()
    dist.destroy_process_group()
