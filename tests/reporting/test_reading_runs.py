"""From folders to runs: every state, damaged files, labels, fronts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_support import STEPS

from globe.reporting.front import fronts, highlighted, pareto, tracks
from globe.reporting.labels import common_options, labels, short_names, varied_options
from globe.reporting.run_files import Trace, read_quality, read_traces
from globe.reporting.runs import ReportRun, read_run, read_runs


def test_runs_of_every_state_are_found_the_smallest_first(runs: tuple[ReportRun, ...], sweep: Path) -> None:
    assert [run.number for run in runs] == list(range(1, 8))
    assert [run.state for run in runs[:3]] == ["finished"] * 3
    kept = [run.summary.kept for run in runs[:3] if run.summary]
    assert kept == sorted(kept)
    assert kept[0] < kept[1] == kept[2]
    rest = {run.name: run for run in runs[3:]}
    assert rest["a|b <i>"].state == "failed"
    assert "broke | badly" in str(rest["a|b <i>"].error)
    assert rest["deeper/killed"].state == "running"
    assert "running, or killed" in str(rest["deeper/killed"].error)
    states = sorted(run.state for name, run in rest.items() if name.startswith("embedded"))
    assert states == ["failed", "interrupted"]
    (failed,) = [run for run in rest.values() if run.error and "this fit broke" in run.error]
    assert failed.options["bank.m"] == 4
    assert rest["a|b <i>"].options == {"seed": 4}
    assert not any(run.measured for run in rest.values())


def test_figures_options_curves_and_quality_are_those_on_disk(
    runs: tuple[ReportRun, ...], sweep: Path
) -> None:
    run = runs[0]
    summary = json.loads((sweep / run.name / "summary.json").read_text())
    assert run.summary is not None
    assert run.summary.relfrob == summary["relfrob"]
    assert (run.options["bank.m"], run.options["train.steps"], run.options["bank.r"]) == (2, STEPS, 11)
    trace = run.traces["layer012.up"]
    assert trace.step == tuple(range(1, STEPS + 1))
    assert trace.relfrob == tuple(1 / (1 + step) for step in range(1, STEPS + 1))
    assert run.quality is not None
    assert (run.quality.perplexity, run.quality.low, run.quality.high) == (8.0, 7.5, 8.5)
    assert (run.quality.original, run.quality.kl, run.quality.kept_model) == (6.5, 0.01, 0.9)
    assert "1,234 tokens" in run.quality.text
    stopped = next(run for run in runs if run.state == "interrupted")
    assert stopped.traces["layer012.up"].step == (1, 2)
    assert stopped.banks_planned == 1


def test_a_line_cut_by_a_kill_and_a_missing_figure_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"bank": "a", "step": 1, "relfrob": 0.5, "lam": true}\n{"bank": "b", "step": 1, "relfrob": null}\n'
        '"text"\n{"step": 2}\n{"bank": "a", "step": 2, "relfrob": NaN}\n{"bank": "a", "st'
    )
    nothing = (None, None)
    assert read_traces(file) == {
        "a": Trace((1, 2), nothing, (0.5, None), nothing, nothing, nothing, nothing),
        "b": Trace((1,), *[(None,)] * 6),
    }
    assert read_traces(tmp_path / "absent") == {}
    file.write_bytes(b"\xff\xfe")
    assert read_traces(file) == {}


@pytest.mark.parametrize("damage", ["{", "[]", '{"format_version": 99}', '{"format_version": 1}'])
def test_damaged_files_are_left_out(
    damage: str, sweep: Path, runs: tuple[ReportRun, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sweep / runs[0].name, folder)
    for name in ("summary.json", "evaluation.json", "config.yaml"):
        (folder / name).write_text(damage)
    run = read_run(folder, folder)
    assert (run.name, run.state, run.summary, run.quality) == ("copy", "unreadable", None, None)
    assert run.error == "summary.json is damaged, or of another version of GloBE"
    assert read_quality(folder / "absent.json") is None
    (folder / "status.json").write_text(damage)
    assert read_run(folder, folder).state == "unknown"


def test_a_single_run_is_a_run_and_a_sweep(sweep: Path, runs: tuple[ReportRun, ...]) -> None:
    folder = sweep / runs[1].name
    (alone,) = read_runs(folder, key="run")
    assert alone.name == runs[1].name
    assert [run.name for run in read_runs(folder, key="sweep")] == [runs[1].name]


def test_labels_tell_runs_apart(runs: tuple[ReportRun, ...]) -> None:
    measured = runs[:3]
    assert varied_options(measured) == ("bank.m", "codes.target_support")
    named = labels(measured)
    assert named[1] == "#1 m=2 support=dense"
    assert (named[2], named[3]) == ("#2 m=3 support=dense", "#3 m=3 support=2")
    assert "bank.m" not in common_options(measured)
    assert common_options(measured)["bank.r"] == 11


def test_short_names_are_never_ambiguous() -> None:
    assert short_names(("a.lam.kind", "a.beta.kind", "bank.m", "seed")) == {
        "a.lam.kind": "lam.kind",
        "a.beta.kind": "beta.kind",
        "bank.m": "m",
        "seed": "seed",
    }
    assert short_names(("a.kind", "b.a.kind"))["a.kind"] == "a.kind"


def test_long_labels_say_only_what_is_uncommon(runs: tuple[ReportRun, ...]) -> None:
    from dataclasses import replace

    usual = {f"schedule.x{at}.kind": "constant" for at in range(9)}
    made = [replace(runs[0], number=at, options=usual) for at in (1, 2)]
    made.append(replace(runs[0], number=3, options=usual | {"schedule.x4.kind": "cosine"}))
    made.append(replace(runs[0], number=4, options=dict.fromkeys(usual, "linear")))
    named = labels(made)
    assert (named[1], named[2]) == ("#1 base", "#2 base")
    assert named[3] == "#3 x4.kind=cosine"
    assert (
        named[4] == "#4 x0.kind=linear x1.kind=linear x2.kind=linear and 6 more"
    )  # whole settings, none is cut


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_nobody_beats(points: list[tuple[int, int]]) -> None:
    chosen = [points[at] for at in pareto([(float(x), float(y)) for x, y in points])]
    slow = {
        one
        for one in points
        if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)
    }
    assert chosen == sorted(slow)


def test_what_is_drawn_in_detail_lies_along_the_front(runs: tuple[ReportRun, ...]) -> None:
    (front,) = fronts(runs).values()
    assert front
    assert {run.number for run in front} <= {1, 2, 3}
    assert {run.number for run in highlighted(runs, 2)} >= {front[0].number}
    assert len(highlighted(runs, 8)) == 3
    assert highlighted(runs, 0) == []
    named = labels(runs)
    assert [one.label for one in tracks(runs[:3], named, 8)] == [named[number] for number in (1, 2, 3)]
    assert [one.label for one in tracks(runs[:1], named, 8)] == ["layer012.up"]


def test_the_three_files_that_make_a_run_are_enough(
    sweep: Path, runs: tuple[ReportRun, ...], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        shutil.copy(sweep / runs[0].name / name, copy)
    (run,) = read_runs(tmp_path, key="sweep")
    assert (run.state, run.measured, run.started) == ("finished", True, None)
    assert (run.summary, run.traces, run.options) == (runs[0].summary, runs[0].traces, runs[0].options)
    with (copy / "metrics.jsonl").open("a") as file:  # a bank that was begun is not in the summary
        file.write('{"bank": "layer013.up", "step": 1}\n')
    (run,) = read_runs(tmp_path, key="sweep")
    assert (run.state, run.measured) == ("unknown", True)
