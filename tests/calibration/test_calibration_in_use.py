"""Calibration as the commands use it: `globe.calibrate`, runs of `globe.train`, and evaluation beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import globe.embedded
from globe.calibration.run import RECORD, recorded_passages
from globe.config.program import main


def command(name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    source = str(Path(__file__).parents[2] / "src")
    return subprocess.run(
        [sys.executable, "-m", f"globe.{name}", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_writes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("layer=1", "tokens=512", "window=64", "out=here")
    done = command("calibrate", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "calibration takes about" in done.stdout
    assert "512 tokens of embedded" in done.stdout
    assert (tmp_path / "here" / "layer-001.safetensors").is_file()
    before = (tmp_path / "here" / "layer-001.safetensors").stat().st_mtime_ns
    again = command("calibrate", *words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "calibration takes about" not in again.stdout
    assert (tmp_path / "here" / "layer-001.safetensors").stat().st_mtime_ns == before
    for wrong, message in (
        ("tokens=0", "calibrate.tokens=0 is not possible"),
        ("layer=99", "layer=99 is not in this model"),
        ("text=absent", "calibrate.text='absent' can't be read"),
        ("tokens=256", "holds something else"),
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["globe", "calibrate", *words, wrong])
        with pytest.raises(SystemExit) as refused:
            main()
        assert refused.value.code == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_calibrated_and_evaluation_says_what_it_was_calibrated_on(tmp_path: Path) -> None:
    options = ("layer=2", "bank.m=2", "bank.r=p/4", "train.steps=2", "output=runs")
    calibration = ("calibrate.text=embedded", "calibrate.tokens=2048", "calibrate.window=64")
    done = command("train", *options, *calibration, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "calibration").iterdir()
    assert (folder / "layer-002.safetensors").is_file()
    (run,) = (one for one in (tmp_path / "runs").iterdir() if one.name != "calibration")
    record = json.loads((run / RECORD).read_text())
    assert record["tokens"] == 2048
    passages = recorded_passages(run)
    assert passages
    patched = command("patch", f"run={run}", "out=patched", cwd=tmp_path)
    assert patched.returncode == 0, patched.stderr
    assert recorded_passages(tmp_path / "patched") == passages
    text = globe.embedded.calibration_path()
    for model, chosen, said in (("patched", str(text), True), (str(run), "embedded", False)):
        shown = command(
            "evaluate", f"model={model}", f"text={chosen}", "max_tokens=600", "experts=0",
            "activation_windows=0", "out=figures.json", cwd=tmp_path,
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        assert ("stands in the calibration text" in shown.stderr) is said
        share = json.loads((tmp_path / "figures.json").read_text())["settings"]["calibration_overlap"]
        assert (share > 0) is said


@pytest.mark.parametrize("name", ["absent", "damaged"])
def test_a_folder_without_a_record_has_no_passages(name: str, tmp_path: Path) -> None:
    if name == "damaged":
        (tmp_path / RECORD).write_text("{}")
    assert recorded_passages(tmp_path) is None
