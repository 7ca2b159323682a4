"""The prepared script for a GPU, rehearsed on the CPU: it runs, counts, and says what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rehearse(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "experiments/gpu/run.py",
        "--device",
        "cpu",
        "--tiny",
        "--steps",
        "4",
        "--out",
        str(out),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_fits_are_measured_and_told(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--stages", "fits")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results.json").read_text())
    fits = record["stages"]
    assert [(one["shape"], one["curvature_dtype"]) for one in fits] == [
        (shape, dtype) for shape in ("6x20x24", "8x12x32") for dtype in ("same", "bfloat16")
    ]
    for one in fits:
        assert one["steps"] == 4
        assert one["relfrob"] < one["relfrob_start"]
        assert one["rate"] > 0
        assert one["best_product"] > 0
    assert (tmp_path / "results.md").read_text().count("\n| ") == 5


def test_a_part_that_runs_out_of_time_is_told_so(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--stages", "forward", "--seconds", "0.1")
    assert done.returncode == 1
    assert "forward float32: ran out of time" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["stages"][0]["code"] is None
