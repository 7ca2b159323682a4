"""Calls in processes forked from this one, each with a process of its own: nothing is imported or read anew."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

_PATIENCE = 10.0
"""Seconds for what still runs at an early end to record that it was interrupted."""


def can_fork() -> bool:
    """On Linux, unless CUDA has begun in this process: a fork could not use it. macOS' frameworks don't survive one."""
    return sys.platform == "linux" and not torch.cuda.is_initialized()


class Forks:
    """The processes at work. Each thread that asks for a call waits for its result; `end` ends what is left."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("fork")
        # held wherever a thread does anything but wait, so that no fork finds a lock that nobody will ever release
        self._lock = threading.Lock()
        self._alive: set[Any] = set()
        self._ended = False

    def call(self, job: Callable[[], Any], *, timeout: float | None = None) -> Any:
        """What the job returns, which must be possible to pickle, as must be what it raises.

        Raises EOFError if the process ends with neither (it was killed), TimeoutError after `timeout` seconds.
        """
        with self._lock:
            if self._ended:
                raise EOFError
            receiver, sender = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_work, args=(sender, job))
            process.start()
            sender.close()  # ours: with the process the last one goes, and the receiver sees the end
            self._alive.add(process)
        try:
            if not receiver.poll(timeout):
                process.kill()
                raise TimeoutError
            with self._lock:
                succeeded, outcome = receiver.recv()
        finally:
            process.join()
            receiver.close()
            self._alive.discard(process)
        if not succeeded:
            raise outcome
        return outcome

    def end(self) -> None:
        """No call begins any more; those that Ctrl-C has reached get time to say so, and then all are killed."""
        self._ended = True
        for process in list(self._alive):
            process.join(_PATIENCE)
            process.kill()


def _work(sender: Connection, job: Callable[[], Any]) -> None:
    try:
        outcome = True, job()
    except KeyboardInterrupt:
        sys.exit(130)  # the one who waits was told as well
    except Exception as error:
        outcome = False, error
    sender.send(outcome)


@contextmanager
def shared_memory() -> Iterator[None]:
    """Around forks: a collection of garbage in one would write to, and so copy, every page of what is shared."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
