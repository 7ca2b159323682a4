"""A run that is killed, or whose disk fails, at any file operation: the same command ends as if nothing had been."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

import globe.fit.one_bank
from globe.config import commands as entry
from globe.train import run
from run_support import FakeFit, composed, lines, load

BENCH = Path(__file__).parents[2] / "experiments" / "bench"
KILL_RESUME = BENCH / "kill_resume.py"
SWEEP_KILL = BENCH / "sweep_kill.py"
_OPERATIONS = ("replace", "rename", "unlink", "fsync")


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", FakeFit())


def small(*overrides: str) -> DictConfig:
    return composed(
        "model.max_experts=4", "bank.m=2", "train.steps=2", "train.checkpoint_every=0", *overrides
    )


@contextmanager
def before_each_operation(do: Callable[[str], None]) -> Iterator[None]:
    """Call `do` with its name before each file operation."""

    def announced(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            do(name)
            return operation(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in _OPERATIONS:
            patch.setattr(os, name, announced(name, getattr(os, name)))
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def figures(folder: Path) -> dict[str, Any]:
    summary = load(folder / "summary.json")
    for bank in summary["banks"]:
        del bank["runtime"]
    return {key: summary[key] for key in ("banks", "failed", "relfrob", "metrics")}


def assert_same(folder: Path, whole: Path, when: str) -> None:
    mine, theirs = contents(folder), contents(whole)
    assert sorted(mine) == sorted(theirs), when
    for name, content in theirs.items():
        if name.endswith(("bank.safetensors", "globe.json")):
            assert mine[name] == content, (when, name)
    assert lines(folder) == lines(whole), when
    assert figures(folder) == figures(whole), when
    assert load(folder / "status.json")["state"] == "finished", when


def test_a_kill_before_any_file_operation_changes_nothing(tmp_path: Path) -> None:
    node, whole, copies = small("layer=4-5"), tmp_path / "whole", []
    seen: set[tuple[tuple[str, bytes], ...]] = set()

    def copy(name: str) -> None:
        state = tuple(sorted(contents(whole).items()))
        if whole.exists() and state not in seen:
            seen.add(state)
            copies.append((f"before {name} {len(copies)}", tmp_path / str(len(copies))))
            shutil.copytree(whole, copies[-1][1])  # what a SIGKILL would leave

    with before_each_operation(copy):
        run(node, whole)
    assert len(copies) > 30
    for when, folder in copies:
        run(node, folder)
        assert_same(folder, whole, when)


def test_a_line_of_the_metrics_that_a_kill_cut_is_written_anew(tmp_path: Path) -> None:
    node = small("layer=4-5")
    run(node, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut = tmp_path / "cut"
    text = (cut / "metrics.jsonl").read_bytes()
    (cut / "metrics.jsonl").write_bytes(text[:-17])
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "banks" / "layer005.up")
    run(node, cut)
    assert_same(cut, tmp_path / "whole", "in the last line")


@pytest.mark.parametrize("broken", ["replace", "rename", "fsync"])
def test_a_disk_that_fails_once_is_one_sentence_and_the_same_command_goes_on(
    tmp_path: Path, broken: str
) -> None:
    node, whole, made = small("layer=4"), tmp_path / "whole", 0

    def count(name: str) -> None:
        nonlocal made
        made += name == broken

    with before_each_operation(count):
        run(node, whole)
    assert made > 0
    for number in range(made):
        folder, done = tmp_path / str(number), 0

        def fail(name: str, number: int = number) -> None:
            nonlocal done
            done += name == broken
            if name == broken and done == number + 1:
                raise OSError(errno.ENOSPC, "No space left on device")

        with before_each_operation(fail), pytest.raises((OSError, ValueError)) as caught:
            run(node, folder)
        assert entry.explain(caught.value), f"{broken} {number}"
        run(node, folder)
        assert_same(folder, whole, f"{broken} {number}")


@pytest.mark.slow
def test_kill_9_at_random_moments_of_a_real_run(tmp_path: Path) -> None:
    options = ("--kills", "3", "--layers", "2", "--steps", "4", "--seed", "1")
    done = subprocess.run(
        [sys.executable, str(KILL_RESUME), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: 3 of 3 kills" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_kill_9_at_random_moments_of_a_sweep(tmp_path: Path, launcher: str) -> None:
    options = ("--seeds", "1", "--kills", "2", "--launcher", launcher)
    done = subprocess.run(
        [sys.executable, str(SWEEP_KILL), *options], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: 3 runs, 2 kills" in done.stdout
