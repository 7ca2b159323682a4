"""A short form of the torture of every reader: `python experiments/torture/readers.py` has the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments" / "torture" / "readers.py"


def test_hostile_inputs_of_every_kind_are_held(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--inputs", "120", "--seed", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "120 tried, 120 held; canary untouched" in done.stdout
    assert list(tmp_path.iterdir()) == []
