"""`python -m globe.evaluate sweep=FOLDER`: every run once, the original once, and on from where it was stopped."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import globe.evaluate as command
import globe.evaluation.sweep as module
from globe.config.command_line import parse_options
from globe.config.commands import start
from globe.config.console import show_table
from globe.evaluation.ground import Remembered
from globe.evaluation.measure import evaluate
from globe.evaluation.options import EvaluateOptions
from globe.evaluation.sweep import SweepResult, evaluate_sweep, sweep_table
from globe.evaluation.text import Window

SMALL = ("window=16", "stride=8", "batch=4", "max_tokens=150")


@pytest.fixture
def sweep(lossless_run: Path, lossy_run: Path, tmp_path: Path) -> Path:
    """Two runs, one in a deeper folder, a twin of the first, one whose bank is damaged, and a hidden one."""
    root = tmp_path / "sweep"
    shutil.copytree(lossless_run, root / "a")
    shutil.copytree(lossy_run, root / "deeper" / "b")
    shutil.copytree(lossless_run, root / "a_S4")
    shutil.copytree(lossy_run, root / "broken")
    shutil.copytree(lossy_run, root / ".hidden")
    for file in root.glob("**/evaluation.json"):
        file.unlink()
    (tensors, *_) = sorted((root / "broken").glob("banks/*/bank.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    return root


def run_command(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["globe.evaluate", *arguments])
        try:
            start(command.main)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def without_time(file: Path) -> dict[str, Any]:
    record = json.loads(file.read_text())
    assert record.pop("seconds") > 0
    return record


def test_each_run_has_the_figures_it_has_alone(
    sweep: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(f"sweep={sweep}", f"text={text_file}", *SMALL) == 1  # for the broken one
    shown = capsys.readouterr()
    for name in ("a", "deeper/b"):
        alone = parse_options(
            EvaluateOptions, [f"model={sweep / name}", f"text={text_file}", f"out={sweep / 'x.json'}", *SMALL]
        )
        expected = json.loads(json.dumps(evaluate(alone).to_dict()))
        expected.pop("seconds")
        expected["settings"]["out"] = None
        assert without_time(sweep / name / "evaluation.json") == expected
    assert sorted(one.parent.name for one in sweep.glob("**/evaluation.json")) == ["a", "b"]
    assert "a_S4 has the banks of a" in shown.out
    assert "python -m globe.report sweep=" in shown.out
    assert "1 run of" in shown.err
    assert "broken" in shown.err
    rows = [line.split("\u2502") for line in shown.out.splitlines() if line.startswith("\u2502")]
    assert {row[1].strip() for row in rows} == {"a", "deeper/b"}


def test_the_original_is_loaded_and_run_once(
    sweep: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import globe.evaluation.perplexity as scoring

    counts = {"original": 0, "model": 0}
    plain = scoring.window_logits

    def counted(model: Any, *arguments: Any) -> torch.Tensor:
        patched = any(type(one).__name__ == "GlobeExperts" for one in model.modules())
        counts["model" if patched else "original"] += 1
        return plain(model, *arguments)

    monkeypatch.setattr(scoring, "window_logits", counted)
    options = parse_options(EvaluateOptions, [f"sweep={sweep}", f"text={text_file}", *SMALL])
    result = evaluate_sweep(options, lambda line: None)
    assert result.measured == 2
    assert counts["model"] == 2 * counts["original"] > 0


def test_a_sweep_goes_on_where_it_was_stopped(
    sweep: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "broken").rename(sweep.parent / "away")
    arguments = (f"sweep={sweep}", f"text={text_file}", *SMALL)
    measured: list[str] = []
    plain = module.measure

    def stopped(subject: Any, *rest: Any) -> Any:
        if measured:
            raise KeyboardInterrupt
        measured.append(subject.name)
        return plain(subject, *rest)

    monkeypatch.setattr(module, "measure", stopped)
    assert run_command(*arguments) == 130
    assert "interrupted: the same command goes on from here" in capsys.readouterr().err
    before = (sweep / "a" / "evaluation.json").stat().st_mtime_ns
    monkeypatch.setattr(module, "measure", plain)
    assert run_command(*arguments) == 0
    assert "measured before" in capsys.readouterr().out
    assert (sweep / "a" / "evaluation.json").stat().st_mtime_ns == before
    assert (sweep / "deeper" / "b" / "evaluation.json").is_file()
    # other settings, or other banks under the same name, are measured anew
    options = parse_options(EvaluateOptions, [*arguments[:2], *SMALL[:3], "max_tokens=140"])
    assert evaluate_sweep(options, lambda line: None).measured == 2
    for folder in ("a", "a_S4"):
        shutil.rmtree(sweep / folder / "banks")
        shutil.copytree(sweep / "deeper" / "b" / "banks", sweep / folder / "banks")
    again = evaluate_sweep(options, lambda line: None)
    assert (again.measured, again.twins) == (1, {"a_S4": "a", "deeper/b": "a"})


def test_a_single_evaluation_promises_nothing_it_can_not_keep(
    lossy_run: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(options: EvaluateOptions) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate", stopped)
    assert run_command(f"model={lossy_run}", f"text={text_file}", *SMALL) == 130
    assert "interrupted: the same command begins anew" in capsys.readouterr().err


def test_logits_are_kept_as_far_as_there_is_room() -> None:
    calls: list[int] = []

    def logits(at: int) -> Callable[[], torch.Tensor]:
        def compute() -> torch.Tensor:
            calls.append(at)
            return torch.full((2, 5, 3), float(at))

        return compute

    remembered = Remembered(room=2 * 5 * 3 * 4)
    groups = [(Window(at, at + 5, 3), Window(at + 5, at + 10, 3)) for at in (0, 10)]
    for _ in range(2):
        for at, group in enumerate(groups):
            assert torch.equal(remembered(group, logits(at)), torch.full((2, 5, 3), float(at)))
    assert calls == [0, 1, 1]


def test_bytes_in_memory_have_a_dtype_and_a_total(
    lossy_run: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was shown as a share left out the bases that are composed besides."""
    out = tmp_path / "x.json"
    arguments = (f"model={lossy_run}", f"text={text_file}", f"out={out}", "dtype=bfloat16", *SMALL)
    assert run_command(*arguments) == 0
    shown = capsys.readouterr().out
    resident, before = (
        json.loads(out.read_text())["sizes"][key] for key in ("resident", "resident_original")
    )
    total, original = (
        sum(one[key] for key in ("dense", "factors", "cache", "rest")) for one in (resident, before)
    )
    assert resident["cache"] > 0
    (line,) = [line for line in shown.splitlines() if "bytes of the model in memory, bfloat16" in line]
    assert f"{total:,}" in line
    assert f"{total / original:.1%} of it" in line
    assert f"{resident['cache']:,} bytes of composed bases" in shown
    assert "python -m globe.patch run=" in shown


@pytest.mark.parametrize("rounded", [False, True])
def test_the_table_says_what_files_take(rounded: bool) -> None:
    def record(kept: int, held: int, perplexity: float) -> dict[str, Any]:
        return {
            "perplexity": {"perplexity": perplexity},
            "rise": {"ratio": 1.02},
            "divergence": None,
            "sizes": {
                "family_parameters": {"before": 1000, "after": kept, "ratio": kept / 1000},
                "family_bytes": {"before": 2000, "after": held, "ratio": held / 2000},
                "model_bytes": {
                    "before": 8000,
                    "after": 6000 + held,
                    "ratio": (6000 + held) / 8000,
                },
            },
        }

    small = 200 if rounded else 800
    runs = {"x_m4_1": record(600, 1200, 30.5), "x_m2_2": record(400, small, 31.25)}
    stream = io.StringIO()
    show_table(Console(file=stream, width=120), sweep_table(SweepResult(records=runs)))
    rows = [line.replace(" ", "").split("\u2502") for line in stream.getvalue().splitlines()]
    rows = [row[1:-1] for row in rows if len(row) > 2]
    few = (["1.60"], ["9.60"]) if rounded else ([], [])
    least = ["m2", "40.0%", *few[0], f"{6000 + small:,}", "77.50%" if rounded else "85.00%", "31.2500"]
    assert rows[0][: len(least)] == least
    assert rows[1][: len(least)] == ["m4", "60.0%", *few[1], "7,200", "90.00%", "30.5000"]
    assert ("bits a" in stream.getvalue()) is rounded
