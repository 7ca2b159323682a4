"""The console script, and the help of train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import globe
from globe.config.help import train_help
from globe.config.program import COMMANDS, main

PROGRAM = (
    "import sys; sys.argv[0] = 'globe'; sys.path.remove(''); from globe.config.program import main; main()"
)


def test_the_script_is_installed_under_its_name() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"globe": "globe.config.program:main"}
    assert project["version"] == globe.__version__


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["globe", *arguments])
    main()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("help",)])
def test_help_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    call(monkeypatch, *arguments)
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)


def test_version_and_near_misses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "--version")
    assert capsys.readouterr().out == f"globe {globe.__version__}\n"
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "evalute")
    assert caught.value.code == 1
    assert capsys.readouterr().err.endswith("(did you mean evaluate?)\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    call(monkeypatch, name, "--help")
    assert "KEY=VALUE" in capsys.readouterr().out


def test_the_help_of_train_tells_every_option_and_file() -> None:
    text = train_help()
    for part in (
        "bank.scope=family",
        "schedule.lam.{kind,start",
        "wandb.log_every=1",
        "submitit_slurm",
        "ablation",
    ):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 120


def test_a_module_of_the_current_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit('foreign code ran')")
    command = [sys.executable, "-c", PROGRAM, "train", "model.max_experts=4", "bank.m=2", "train.steps=1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ.copy(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "artefact: outputs/embedded_up_Lmid" in done.stdout


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trian.steps=3", "train"),
        ("train.stesp=3", "steps"),
        ("experiment=ablatoin", "ablation"),
        ("device=cud", "cuda"),
    ],
)
def test_a_near_miss_is_proposed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: str,
    meant: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "train", typed)
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.endswith(f"(did you mean {meant}?)\n"), said
    assert not list(tmp_path.iterdir()), "a failed command leaves no folder"
