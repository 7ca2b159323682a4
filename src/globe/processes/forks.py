"""Run calls in forks of this process, one fork for each call, so that nothing is imported or read anew."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from globe.config.commands import INTERRUPTED

_PATIENCE = (2.0, 5.0, 5.0)
"""Seconds that what still runs at an early end has to record an interrupt: after that of the user, and then after two
of ours, since Python drops one that lands in a finaliser."""


_WHY = {
    -signal.SIGKILL: "its process was killed, most likely for want of memory",
    -signal.SIGTERM: "its process was stopped",
    INTERRUPTED: "interrupted",
}


class LostProcessError(Exception):
    """A process ended without a result; a negative exit code is that of a signal."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(_WHY.get(exit_code or 0, f"its process ended with exit code {exit_code}"))


def can_fork() -> bool:
    """Return whether forks work here: on Linux (macOS' frameworks don't survive one) unless CUDA has begun already."""
    return sys.platform == "linux" and not torch.cuda.is_initialized()


class Forks:
    """The forks at work. A thread that asks for a call waits for its result; `end` ends what is left."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("fork")
        # held wherever a thread does anything but wait, so that no fork finds a lock that nobody will ever release
        self._lock = threading.Lock()
        self._alive: set[Any] = set()
        self._ended = False

    def call(self, job: Callable[[], Any], *, timeout: float | None = None) -> Any:
        """Return what the job returns, which pickle must be able to send, as it must what the job raises.

        Raises LostProcessError if the process ends with neither, TimeoutError after `timeout` seconds.
        """
        with self._lock:
            if self._ended:
                raise LostProcessError(INTERRUPTED)
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
        except EOFError:
            process.join()
            raise LostProcessError(process.exitcode) from None
        finally:
            process.join()
            receiver.close()
            self._alive.discard(process)
        if not succeeded:
            raise outcome
        return outcome

    def end(self) -> None:
        """Let no call begin any more; give what is left time to record that it was interrupted, and then kill it."""
        with self._lock:  # a process that has just begun is among those alive, too
            self._ended = True
        for patience, number in zip(_PATIENCE, (signal.SIGINT, signal.SIGINT, signal.SIGKILL), strict=True):
            until = time.monotonic() + patience
            for process in list(self._alive):
                # not joined: its exit code goes to one thread alone, and that is the one which waits in `call`
                if not wait([process.sentinel], max(0.0, until - time.monotonic())):
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, number)


def _work(sender: Connection, job: Callable[[], Any]) -> None:
    try:
        outcome = True, job()
    except KeyboardInterrupt:
        # a second one in what Python does at exit is another exit code
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(INTERRUPTED)
    except Exception as error:
        outcome = False, error
    sender.send(outcome)


@contextmanager
def shared_memory() -> Iterator[None]:
    """Keep garbage collections of forks from writing to, and so copying, every page of what is shared."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
