"""Calls in forked processes: what comes back, and what becomes of one that is killed, slow, or left over."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from globe.processes import forks
from globe.processes.forks import Forks, LostProcessError, can_fork

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="joblib's own processes are used elsewhere"),
    # Python 3.12 warns of every fork beside threads, such as those of pytest-xdist
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def call_beside(calls: Forks, job: Callable[[], object]) -> tuple[threading.Thread, list[str]]:
    """Make a call in a thread, begun already; the list gets how its process was lost."""
    ends: list[str] = []

    def call() -> None:
        try:
            calls.call(job)
        except LostProcessError as lost:
            ends.append(str(lost))

    thread = threading.Thread(target=call)
    thread.start()
    return thread, ends


def test_a_call_sees_what_is_here_changes_nothing_of_it_and_hands_its_result_back() -> None:
    seen = [3]

    def job() -> tuple[int, list[int]]:
        seen.append(5)
        return os.getpid(), seen

    process, result = Forks().call(job)
    assert process != os.getpid()
    assert (result, seen) == ([3, 5], [3])
    assert gone(process)


def test_an_error_of_a_call_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        Forks().call(lambda: 1 / 0)


def test_a_killed_call_is_an_end_without_a_result_and_spares_the_one_beside_it() -> None:
    calls = Forks()
    beside, ends = call_beside(calls, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert calls.call(lambda: "whole") == "whole"
    beside.join(60)
    assert ends == ["its process was killed, most likely for want of memory"]


def test_a_call_that_leaves_the_process_says_with_which_code() -> None:
    with pytest.raises(LostProcessError, match="exit code 3"):
        Forks().call(lambda: os._exit(3))


def test_a_call_that_takes_too_long_is_killed() -> None:
    with pytest.raises(TimeoutError):
        Forks().call(lambda: time.sleep(600), timeout=0.1)


@pytest.mark.parametrize(
    ("deaf", "end"),
    [(False, "interrupted"), (True, "its process was killed, most likely for want of memory")],
)
def test_at_the_end_what_is_left_is_interrupted_or_killed_and_nothing_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deaf: bool, end: str
) -> None:
    # one that hears is waited for as long as it takes, unless Python drops the first interrupt
    monkeypatch.setattr(forks, "_PATIENCE", (0.01, 0.01, 0.01) if deaf else (0.01, 30, 600))
    calls = Forks()

    def job() -> None:
        if deaf:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        (tmp_path / "begun").touch()
        time.sleep(600)

    beside, ends = call_beside(calls, job)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    calls.end()
    beside.join(60)
    assert ends == [end]
    with pytest.raises(LostProcessError, match="interrupted"):
        calls.call(lambda: None)


def test_the_end_finds_a_process_that_began_the_moment_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(forks, "_PATIENCE", (0.01, 30, 600))
    calls = Forks()
    start = calls._context.Process.start

    def slowly(process: object) -> None:
        start(process)
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        (tmp_path / "slow").touch()
        time.sleep(0.3)  # what a busy machine may take between the start and a note of it

    def job() -> None:
        (tmp_path / "begun").touch()
        time.sleep(600)

    monkeypatch.setattr(calls._context.Process, "start", slowly)
    beside, ends = call_beside(calls, job)
    while not (tmp_path / "slow").exists():
        time.sleep(0.01)
    calls.end()
    beside.join(60)
    assert ends == ["interrupted"]


def test_a_second_interrupt_at_the_end_of_a_process_does_not_change_how_it_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leave(code: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(code)

    def job() -> None:
        monkeypatch.setattr(sys, "exit", leave)  # in the fork alone
        raise KeyboardInterrupt

    with pytest.raises(LostProcessError, match="interrupted"):
        Forks().call(job)


def test_a_process_that_uses_cuda_does_not_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_fork()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    assert not can_fork()
