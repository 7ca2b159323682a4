"""The last part of `make demo`, on a run of two banks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import random_bank, write_run

from globe.checkpoint import open_checkpoint
from globe.evaluate import EvaluateOptions, evaluate
from globe.files import write_json
from globe.patch import parse, patch

SCRIPT = Path(__file__).parents[2] / "experiments" / "demo" / "demo.py"


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_demo_loads_both_forms_prints_its_table_and_lets_them_write(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(None)
    run = write_run(tmp_path / "run", [random_bank(checkpoint, [(3, one)], seed=5) for one in ("up", "gate")])
    banks = [{"m": 4, "r": 28, "atom_rank": None}, {"m": 16, "r": 29, "atom_rank": 5}]
    write_json(run / "summary.json", {"banks": banks, "relfrob": 0.26371})
    for form in ("dense", "globe"):
        out = tmp_path / form
        patch(parse([f"run={run}", f"out={out}", f"format={form}"]))
        result = evaluate(EvaluateOptions(model=str(out), max_tokens=300))
        write_json(out / "evaluation.json", result.to_dict())
    done = program(str(tmp_path), "--tokens", "12", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 banks of m=16 r=29 k=5, m=4 r=28; RelFrob 0.2637 on average" in done.stdout
    figures = json.loads((tmp_path / "globe" / "evaluation.json").read_text())
    assert f"{figures['perplexity']['perplexity']:.2f}" in done.stdout
    assert f"{figures['sizes']['model_bytes']['after']:,}" in done.stdout
    assert done.stdout.count("And it came to pass in those days, that") == 2


@pytest.mark.slow
def test_without_the_evaluations_it_says_what_to_do(tmp_path: Path) -> None:
    done = program(str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert "is missing: run make demo" in done.stderr
    assert "Traceback" not in done.stderr
