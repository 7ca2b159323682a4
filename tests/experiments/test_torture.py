"""The short form of the torture of runs; the long one is `python experiments/torture/faults.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).parents[2] / "experiments" / "torture" / "faults.py"


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_every_ninth_file_operation_fails_memory_runs_out_and_runs_are_killed(tmp_path: Path) -> None:
    options = ("--short", "--every", "9", "--kills", "4", "--fits", "12", "--seed", "1")
    done = subprocess.run(
        [sys.executable, str(TORTURE), *options], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 7
    assert all(int(tried) == int(held) > 0 for _, tried, held in rows)
    assert not list(tmp_path.iterdir())
