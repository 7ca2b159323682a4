"""A short form of the torture of every command: `python experiments/torture/commands.py` has the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "torture" / "commands.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_hostile_folders_are_held_by_every_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--inputs", "60", "--seed", "7"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | 60 | 60 |" in done.stdout
    assert list(tmp_path.iterdir()) == []
