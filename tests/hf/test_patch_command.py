"""`python -m globe.patch`: its options, its sentences, and what it finds out by itself."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from made_runs import random_bank, random_run, write_run

import globe.patch as command
from globe.checkpoint import open_checkpoint
from globe.config.commands import start
from globe.errors import ArtefactError, ConfigError
from globe.hf.destination import RECORD
from globe.hf.run_banks import open_run
from globe.patch import Format, parse
from globe.runs.folder import BankStatus, RunFolder, State


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["globe.patch", *arguments])
    try:
        start(command.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_options_are_read_into_their_types() -> None:
    options = parse(
        ["run=a", "out=b/c", "format=globe", "model.path=owner/name", "model.revision=main", "S_cache=4"]
    )
    assert (options.run, options.out, options.format, options.S_cache) == ("a", "b/c", Format.globe, 4)
    assert (options.model.path, options.model.revision) == ("owner/name", "main")
    plain = parse(["a", "out=b"])
    assert plain.run == "a"
    assert (plain.format, plain.model.path, plain.S_cache, plain.overwrite) == (
        Format.dense,
        None,
        None,
        False,
    )


def test_a_look_at_the_result_is_taken_or_not() -> None:
    typed = [parse(["run=a", "out=b", f"check={one}"]).check for one in ("true", "false", "auto")]
    assert typed == [True, False, "auto"]
    with pytest.raises(ConfigError, match="check='never' is not possible: give one of auto, true, false"):
        parse(["run=a", "out=b", "check=never"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run=a"], "out is missing"),
        (["out=a"], "run is missing"),
        (["run=a", "out=b", "colour=red"], "colour is not an option: give one of run, out, format"),
        (["run=a", "out=b", "model.colour=red"], "model.colour is not an option"),
        (["run=a", "out=b", "format=gguf"], "give one of dense, globe"),
        (["run=a", "out=b", "overwrite=perhaps"], "give true or false"),
        (["run=a", "b"], "'b' is not understood"),
        (["run=nowhere", "out=b"], "'nowhere' holds no finished bank"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_1(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, *arguments) == 1
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_names_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    names = [one.name for one in fields(command.PatchOptions) if one.name != "model"]
    names += [f"model.{one.name}" for one in fields(command.SourceOptions)]
    assert all(f"\n{name}=" in text for name in names)


@pytest.mark.parametrize("form", ["dense", "globe"])
def test_the_command_finds_the_model_by_itself_and_says_what_it_kept(
    form: str,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = random_run(tiny("olmoe"), tmp_path / "run", ["up"])
    given = str(run) if form == "dense" else f"run={run}"  # the run may stand alone
    assert run_command(monkeypatch, given, f"out={tmp_path / 'out'}", f"format={form}") == 0
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["format"] == form
    line = capsys.readouterr().out.strip()
    assert f"{form}, 2 banks" in line
    assert f"{record['parameters']['kept_of_families']:.3f} of the compressed families" in line
    assert f"{record['parameters']['kept_of_model']:.3f} of the model's" in line
    banks = sum(file.stat().st_size for file in run.glob("banks/*/bank.safetensors"))
    bits = re.search(r" of the compressed families in (\S+) bits a weight, ", line)
    assert bits is not None
    assert 0.5 * banks < float(bits[1]) / 8 * record["parameters"]["families"] < banks  # without headers
    held = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert f"; {held:,} bytes of weights in files" in line
    before = sum(file.stat().st_size for file in tiny("olmoe").glob("*.safetensors"))
    assert f", {held / before:.1%} of the original's" in line
    assert (", since experts are multiplied out" in line) is (form == "dense")
    assert (held == before) is (form == "dense")


def test_an_unfinished_run_is_used_as_far_as_it_is_and_said_to_be_so(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunFolder(tmp_path / "run")
    run.begin({"seed": 0})
    random_run(tiny("olmoe"), run.path, ["up"])
    run.report("layer000.up", BankStatus(State.finished))
    run.report("layer001.up", BankStatus(State.failed))
    (run.path / "banks" / "layer001.up").rename(tmp_path / "elsewhere")
    run.end(State.failed)
    assert run_command(monkeypatch, f"run={run.path}", f"out={tmp_path / 'out'}") == 0
    shown = capsys.readouterr()
    assert "1 bank;" in shown.out
    assert "is failed: only the banks it has were used, without layer001.up" in shown.err


def test_the_embedded_model_is_found(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(None)
    run = write_run(tmp_path / "run", [random_bank(checkpoint, [(12, "up")])])
    record = command.patch(parse([f"run={run}", f"out={tmp_path / 'out'}"]))
    assert record["source"] == checkpoint.source()
    assert open_checkpoint(str(tmp_path / "out")).moe_layers == checkpoint.moe_layers


def test_a_revision_for_a_folder_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    run = random_run(tiny("olmoe"), tmp_path / "run", ["up"])
    options = parse([f"run={run}", f"out={tmp_path / 'out'}", "model.revision=main"])
    with pytest.raises(ValueError, match=r"model\.revision"):
        command.patch(options)
    with pytest.raises(ConfigError, match="out is missing"):
        parse([f"run={run}"])


@pytest.mark.parametrize("harm", ["gone", "record", "link"])
def test_a_bank_that_a_run_finished_and_lost_is_not_passed_over(
    harm: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without it the patched model would be another, and nobody would be told."""
    run = random_run(tiny("qwen2_moe"), tmp_path / "run")
    keys = sorted(one.name for one in (run / "banks").iterdir())
    folder = RunFolder(tmp_path / "state")
    folder.begin({})
    for key in keys:
        folder.report(key, BankStatus(State.finished))
    folder.end(State.finished)
    shutil.copy(folder.status_file, run / "status.json")
    assert len(open_run(run)) == len(keys)
    record = run / "banks" / keys[1] / "globe.json"
    if harm == "gone":
        shutil.rmtree(record.parent)
    else:
        record.unlink()
    if harm == "link":
        record.symlink_to(record.name)
    with pytest.raises(ArtefactError, match=f"finished the bank {keys[1]}, and .* the same globe.train"):
        open_run(run)
    assert len(open_run(run / "banks" / keys[0])) == 1
