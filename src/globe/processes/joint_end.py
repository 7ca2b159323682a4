"""How the processes of one fit end together: by one sentence, whichever of them fails or is told to stop.

A process that ends leaves its sentence in the store that all of them reach; a thread in every process looks there,
since the main thread may be waiting for the one that is gone.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from globe.config import commands as entry
from globe.runs.folder import State

STOPPED = "this fit was stopped, or another process of it was killed: the same command goes on from the last checkpoint"
"""What is said when a signal ends the processes: torchrun sends one to all others when it loses one."""
_LOOK_EVERY = 0.2
_GRACE = 3.0
"""Seconds between two looks, and those that the main thread has after a signal to end by itself."""
_FAREWELL = 5.0
"""Seconds that a process gives the first one to record its sentence, or to say what all of them have to say."""
_ENDED, _RECORDED, _FIRST = "globe/ended", "globe/recorded", "globe/first"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ending:
    """The end of this process's part. Made by the main thread, and closed by it once all has gone well."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.store, self.rank = store, rank
        self.record: Callable[[State, str | None], None] = lambda state, sentence: None
        """how the first process keeps what ended the run"""
        self._over = threading.Event()
        self._told = False
        # written to by the interpreter itself, even while the main thread waits inside a library
        self._wakes, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        self._handlers = [(number, signal.signal(number, self._signalled)) for number in _SIGNALS]
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def leave(self, sentence: str) -> NoReturn:
        """End all processes, this one now; the sentence is printed unless another process was first with its own."""
        self._over.set()
        first = True
        with suppress(RuntimeError):  # the store may be gone with the process that ended
            first = self.store.add(_FIRST, 1) == 1
        if first:
            entry.say(sentence)
        with suppress(RuntimeError):
            if first:
                self.store.set(_ENDED, sentence)
            if self.rank == 0:
                self.store.set(_RECORDED, "")
            elif first:
                self._await_record()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # not by an exception: libraries that wait for the others would be taken down under their own threads
        os._exit(entry.INTERRUPTED if sentence == STOPPED else 1)

    def close(self) -> None:
        """All went well: no more looks, and signals mean again what they did."""
        self._over.set()
        self._watch.join()
        for number, handler in self._handlers:
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._wakes.close()
        self._woken.close()

    def _await_record(self) -> None:
        deadline = time.monotonic() + _FAREWELL
        while time.monotonic() < deadline and not self.store.check([_RECORDED]):
            time.sleep(_LOOK_EVERY)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        # once, and not amid an error that is on its way out and has a better sentence
        if not self._told and not self._over.is_set() and sys.exc_info()[0] is None:
            self._told = True
            raise KeyboardInterrupt

    def _look(self) -> None:
        """Ends this process when another has ended, or some time after a signal."""
        deadline = None
        while not self._over.is_set():
            if select.select([self._wakes], [], [], _LOOK_EVERY)[0]:
                self._wakes.recv(64)
                deadline = deadline or time.monotonic() + _GRACE
            if deadline is not None and time.monotonic() < deadline:
                continue
            sentence = self._sentence()
            if sentence is None and deadline is None:
                continue
            if not self._over.is_set():
                self._end(sentence or STOPPED)

    def _sentence(self) -> str | None:
        """Of the process that has ended first, if one has."""
        try:
            return self.store.get(_ENDED).decode() if self.store.check([_ENDED]) else None
        except RuntimeError:
            return None  # the store is gone, which the next exchange says as well

    def _end(self, sentence: str) -> None:
        if self.rank == 0:
            with suppress(OSError):
                stopped = sentence == STOPPED
                self.record(*((State.interrupted, None) if stopped else (State.failed, sentence)))
        self.leave(sentence)


def leave_it_to_the_first(sentence: str) -> None:
    """In place of a sentence that the first process has to say as well: time to do so, before torchrun stops it."""
    time.sleep(_FAREWELL)
