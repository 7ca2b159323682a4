"""`python -m globe.train` as it is typed: output, exit codes, folders."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from run_support import load


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "globe.train", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_typed_command_prints_its_summary_and_no_bar_into_a_pipe(tmp_path: Path) -> None:
    done = program("family=up", "layer=12", "bank.m=n/4", "train.steps=2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "RelFrob" in done.stdout
    (folder,) = (tmp_path / "outputs").iterdir()
    assert (folder / "train.log").is_file()
    assert "artefact: outputs/" in done.stdout


def test_a_sweep_goes_on_after_a_failed_run_and_says_so_at_the_end(tmp_path: Path) -> None:
    done = program("-m", "bank.m=n/5,n/8", "bank.r=p/4", "sweep=sizes", "train.steps=1", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert (
        done.stderr.splitlines()[-1]
        == "bank.m='n/5' is 3.2 for n=16, not a whole number: give 3 or 4, or round(n/5)"
    )
    folders = sorted(one for one in (tmp_path / "outputs" / "sizes").iterdir() if one.is_dir())
    assert [load(folder / "status.json")["state"] for folder in folders] == ["failed", "finished"]
    assert len(list(tmp_path.rglob("status.json"))) == 2


def test_showing_the_configuration_runs_nothing(tmp_path: Path) -> None:
    done = program("--cfg", "job", "family=gate", cwd=tmp_path)
    assert done.returncode == 0
    assert "family: gate" in done.stdout.splitlines()
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_one_sentence_and_exit_code_130(tmp_path: Path) -> None:
    # all layers: one bank alone would stall, and be finished, within seconds
    command = [
        "train.steps=100000",
        "train.patience=0",
        "train.checkpoint_every=0",
        "model.max_experts=8",
        "layer=all",
    ]
    running = subprocess.Popen(
        [sys.executable, "-m", "globe.train", "bank.m=2", *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.partial/state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    with running:
        for _ in range(
            6
        ):  # as a person would: again, when nothing happens (Python drops one that lands in a finaliser)
            running.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                _, error = running.communicate(timeout=30)
                break
        else:
            running.kill()
            pytest.fail("six interrupts did not stop the run")
    assert (running.returncode, error) == (130, "interrupted: the same command goes on from here\n")
    (status,) = tmp_path.rglob("status.json")
    assert load(status)["state"] == "interrupted"
