"""A process that waits for another inside a library is ended all the same, with what ended it on record."""

from __future__ import annotations

import subprocess
import sys

import pytest

from globe.processes.torchrun import STOPPED

_WAITING = """
import os, signal, threading
from datetime import timedelta
import torch
import torch.distributed as dist
import globe.processes.torchrun

globe.processes.torchrun._GRACE = 0.2
store = dist.HashStore()
group = globe.processes.torchrun.Torchrun(torch.device("cpu"), store, 0)
group.record = lambda state, sentence: print(state, sentence, flush=True)

def happen():
    {what}
    os.kill(os.getpid(), signal.SIGTERM)  # by torchrun, once a process has ended

threading.Timer(0.2, happen).start()
store.wait(["what never comes"], timedelta(seconds=60))
"""
_ELSEWHERE = "store.add('globe/said', 1); store.set('globe/why', 'the disk is full')"


@pytest.mark.parametrize(
    ("what", "code", "recorded", "said"),
    [
        ("pass", 130, "interrupted None\n", f"{STOPPED}\n"),
        (_ELSEWHERE, 1, "failed the disk is full\n", ""),  # said by the other process
    ],
    ids=["signal", "another failed"],
)
def test_a_process_that_waits_in_vain_is_ended(what: str, code: int, recorded: str, said: str) -> None:
    script = _WAITING.format(what=what)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (code, recorded, said)
