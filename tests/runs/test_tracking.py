"""Sinks: what they get, that `disabled` costs nothing, and that a broken tracker harms nothing."""

from __future__ import annotations

import csv
import inspect
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import globe.fit.one_bank
from globe.config.choices import WandbMode
from globe.config.schema import WandbConfig
from globe.runs import tracking
from globe.runs.tracking import (
    Background,
    Fanout,
    Guarded,
    JsonlSink,
    RunInfo,
    Scalar,
    Sink,
    WandbSink,
    open_sinks,
)
from run_support import FakeFit, load, run_in


def info(folder: Path, *banks: str, sweep: str | None = None) -> RunInfo:
    return RunInfo("a-run", folder, {"seed": 3}, banks or ("layer012.up",), sweep)


class Recorder:
    """A tracker in a few lines, as another one would be written."""

    def __init__(self, breaks_at: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self.breaks_at = breaks_at

    def _note(self, name: str, what: Any) -> None:
        self.calls.append((name, what))
        if name == self.breaks_at:
            raise RuntimeError("first line\nsecond line")

    def open(self, run: RunInfo) -> None:
        self._note("open", run.name)

    def log(self, bank: str, step: int, values: Mapping[str, Scalar]) -> None:
        self._note("log", (bank, step, dict(values)))

    def finish(self, summary: Mapping[str, Any], *, state: str) -> None:
        self._note("finish", state)


class FakeWandb:
    """Stands in for the wandb module: records what it is told."""

    def __init__(self, *, key: bool = True, online_works: bool = True) -> None:
        self.key, self.online_works = key, online_works
        self.inits: list[dict[str, Any]] = []
        self.metrics: dict[str, dict[str, Any]] = {}
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.artifacts: list[FakeWandb.Artifact] = []

    def login(self, *, prompt: bool) -> bool:
        assert prompt is False, "a run must never ask for a key"
        return self.key

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    class Artifact:
        def __init__(self, name: str, *, type: str, metadata: dict[str, Any]) -> None:
            self.name, self.type, self.metadata, self.folder = name, type, metadata, ""

        def add_dir(self, folder: str) -> None:
            self.folder = folder

    def log_artifact(self, artifact: Artifact) -> None:
        self.artifacts.append(artifact)

    def Histogram(self, values: Any) -> tuple[str, list[int]]:
        return ("histogram", list(values))

    def init(self, **values: Any) -> FakeWandb:
        self.inits.append(values)
        if values["mode"] == "online" and not self.online_works:
            raise ConnectionError("no route to host")
        return self

    def define_metric(self, name: str, **values: Any) -> None:
        self.metrics[name] = values

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_file_has_one_flat_object_per_step(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.open(info(tmp_path))
    sink.log("layer001.up", 1, {"relfrob": 0.5, "accepted": True, "validation_relfrob": None})
    sink.log("layer001.up", 2, {"relfrob": float("nan"), "damping": float("inf")})
    first, second = (json.loads(line) for line in sink.path.read_text().splitlines())
    assert first == {
        "bank": "layer001.up",
        "step": 1,
        "relfrob": 0.5,
        "accepted": True,
        "validation_relfrob": None,
    }
    assert second == {"bank": "layer001.up", "step": 2, "relfrob": None, "damping": None}


# --- harmless -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["open", "log", "finish"])
def test_a_sink_that_breaks_is_warned_about_once_and_left_alone(
    method: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken, whole = Recorder(breaks_at=method), Recorder()
    sinks = Fanout([Guarded(broken), whole])
    with caplog.at_level(logging.WARNING):
        sinks.open(info(tmp_path))
        for step in (1, 2, 3):
            sinks.log("layer012.up", step, {"relfrob": 0.5})
        sinks.finish({"banks": []}, state="finished")
    assert [name for name, _ in whole.calls] == ["open", "log", "log", "log", "finish"]
    assert broken.calls[-1][0] == method
    assert len(broken.calls) == ["open", "log", "_", "_", "finish"].index(method) + 1
    (record,) = caplog.records
    assert (
        record.getMessage()
        == f"Recorder failed to {method} (RuntimeError: first line): the run goes on without it"
    )


def test_protocol_is_what_the_sinks_have() -> None:
    guarded = Guarded(Recorder())
    wrapped = (guarded, Background(guarded, patience=1), Fanout([]))
    for sink in (JsonlSink(Path("x")), WandbSink(WandbConfig()), CsvSink(Path("x")), Recorder(), *wrapped):
        assert isinstance(sink, Sink)


class CsvSink:
    """Another tracker, as it would be added: a table with a column per figure, and the summary beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def open(self, run: RunInfo) -> None:
        self.title = f"{run.sweep or 'single'}/{run.name} m={run.config['m']} r={run.config['r']}"

    def log(self, bank: str, step: int, values: Mapping[str, Scalar]) -> None:
        self.rows.append({"bank": bank, "step": step} | dict(values))

    def finish(self, summary: Mapping[str, Any], *, state: str) -> None:
        with self.path.open("w", newline="") as file:
            file.write(f"# {self.title}: {state}, RelFrob {summary['relfrob']:.3f}\n")
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def test_another_tracker_is_at_most_forty_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(inspect.getsource(CsvSink).splitlines()) <= 40
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", FakeFit())
    table = tmp_path / "table.csv"

    def with_table(config: WandbConfig, metrics: Path, run: RunInfo) -> Fanout:
        sinks = Fanout([JsonlSink(metrics), Background(Guarded(CsvSink(table)), patience=60)])
        sinks.open(run)
        return sinks

    monkeypatch.setattr(globe.train, "open_sinks", with_table)
    figure, folder = run_in(tmp_path, "train.steps=3", "bank.m=n/4", "bank.r=11")
    title, *rows = table.read_text().splitlines()
    assert title == f"# single/{folder.name} m=4 r=11: finished, RelFrob {figure:.3f}"
    assert [row["step"] for row in csv.DictReader(rows)] == ["1", "2", "3"]


# --- slow -----------------------------------------------------------------------------------------------------------


class Waiting(Recorder):
    """A tracker that does nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def _note(self, name: str, what: Any) -> None:
        assert self.let_go.wait(60)
        super()._note(name, what)


def test_no_step_waits_for_a_slow_sink_and_it_is_told_everything_in_order(tmp_path: Path) -> None:
    slow = Waiting()
    sink = Background(slow, patience=60)
    sink.open(info(tmp_path))
    for step in (1, 2, 3):
        sink.log("layer012.up", step, {"relfrob": 1 / step})
    assert slow.calls == [], "the sink was not let go, and nothing has waited for it"
    slow.let_go.set()
    sink.finish({"banks": []}, state="finished")
    assert [name for name, _ in slow.calls] == ["open", "log", "log", "log", "finish"]
    assert [what[1] for name, what in slow.calls if name == "log"] == [1, 2, 3]


class Busy(Recorder):
    """A tracker that takes processor time for every point, and notes when it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[float] = []

    def log(self, bank: str, step: int, values: Mapping[str, Scalar]) -> None:
        self.moments.append(time.thread_time())
        while time.thread_time() < self.moments[-1] + 0.01:
            pass
        super().log(bank, step, values)


def test_a_sink_that_takes_processor_time_rests_while_the_fit_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    busy = Busy()
    sink = Background(busy, patience=60)

    class Ending(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            rests.append(timeout)
            return super().wait(0)

    monkeypatch.setattr(sink, "_ending", Ending())
    for step in (1, 2, 3):
        sink.log("layer012.up", step, {})
    sink.open(info(tmp_path))
    sink.finish({"banks": []}, state="finished")
    long = [rest for rest in rests if rest >= 0.49]  # 49 times a hundredth of a second
    assert len(long) >= 3
    assert [name for name, _ in busy.calls] == ["log", "log", "log", "open", "finish"]


def test_a_sink_that_hangs_is_given_up_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hanging = Waiting()
    sink = Background(hanging, patience=0.01, capacity=3)
    sink.open(info(tmp_path))
    for step in range(1, 8):
        sink.log("layer012.up", step, {})
    sink.finish({"banks": []}, state="finished")
    assert "the tracker is not done after 0.01 s: the run goes on without it" in caplog.text
    assert sink.dropped in (4, 5), "three or four of eight calls fit, as the thread took the first or not"
    assert f"too slow for {sink.dropped} points: metrics.jsonl has them" in caplog.text
    hanging.let_go.set()


def test_a_sink_that_was_never_opened_finishes_at_once(tmp_path: Path) -> None:
    recorder = Recorder()
    Background(recorder, patience=60).finish({}, state="failed")
    assert recorder.calls == []


def test_a_tracker_that_breaks_in_the_middle_does_not_change_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", FakeFit())
    plain, _ = run_in(tmp_path / "plain", "train.steps=3")

    class Broken(FakeWandb):
        def log(self, values: dict[str, Any]) -> None:
            raise SystemError("the service is gone")

    monkeypatch.setitem(sys.modules, "wandb", Broken())
    tracked, folder = run_in(tmp_path / "tracked", "train.steps=3", "wandb=offline")
    assert tracked == plain
    assert load(folder / "status.json")["state"] == "finished"
    assert caplog.text.count("the run goes on without it") == 1


# --- wandb ----------------------------------------------------------------------------------------------------------


def test_disabled_never_imports_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from globe.train import main; "
        "sys.argv = ['train', 'train.steps=1', 'model.max_experts=4', 'bank.m=2', 'bank.r=5']; main(); "
        "print([name for name in sys.modules if name.startswith('wandb')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_wandb_gets_group_tags_config_metrics_and_histograms(tmp_path: Path, wandb: FakeWandb) -> None:
    config = WandbConfig(mode=WandbMode.offline, tags=["t"], project="p", log_every=2)
    sinks = open_sinks(config, tmp_path / "metrics.jsonl", info(tmp_path, sweep="ablation"))
    for step in (1, 2, 3, 4):
        sinks.log("layer012.up", step, {"relfrob": 1 / step, "validation_relfrob": None})
    bank = {"key": "layer012.up", "relfrob": 0.25, "supports": [3, 4], "metrics": {"mse": 0.5, "odd": None}}
    sinks.finish({"banks": [bank], "relfrob": 0.25, "name": "a-run", "failed": {}}, state="finished")
    (init,) = wandb.inits
    assert (init["mode"], init["group"], init["tags"], init["project"]) == ("offline", "ablation", ["t"], "p")
    assert (init["name"], init["config"], init["dir"]) == ("a-run", {"seed": 3}, tmp_path)
    assert init["job_type"] == "train"
    assert wandb.metrics["relfrob"] == {"step_metric": "step", "summary": "min"}
    assert wandb.logged[:2] == [{"relfrob": 0.5, "step": 2}, {"relfrob": 0.25, "step": 4}]
    assert wandb.logged[2] == {"supports": ("histogram", [3, 4])}
    assert wandb.summary["final/mse"] == 0.5
    assert wandb.summary["run/relfrob"] == 0.25
    assert "final/odd" not in wandb.summary
    assert wandb.exit_code == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_runs_of_a_sweep_have_ids_of_their_own_whatever_the_environment_says(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "one-for-all")
    for _ in range(2):
        WandbSink(WandbConfig(mode=WandbMode.offline)).open(info(tmp_path))
    ids = [init["id"] for init in wandb.inits]
    assert len({*ids, "one-for-all"}) == 3
    assert all(ids)


def test_banks_are_logged_as_artefacts_when_asked_for(tmp_path: Path, wandb: FakeWandb) -> None:
    for asked in (False, True):
        sinks = open_sinks(
            WandbConfig(mode=WandbMode.offline, log_artifact=asked, job_type="probe"),
            tmp_path / "metrics.jsonl",
            info(tmp_path, "layer001.up+gate"),
        )
        sinks.finish({"banks": [{"key": "layer001.up+gate", "m": 3, "relfrob": 0.5}]}, state="finished")
        assert len(wandb.artifacts) == asked
    (one,) = wandb.artifacts
    assert (one.name, one.type) == ("a-run.layer001.up-gate", "bank")
    assert one.folder == str(tmp_path / "banks" / "layer001.up+gate")
    assert one.metadata == {"m": 3, "relfrob": 0.5}
    assert wandb.inits[0]["job_type"] == "probe"


def test_a_run_tells_the_keys_that_sweeps_are_read_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: FakeWandb
) -> None:
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", FakeFit())
    options = ("bank.m=n/4", "bank.r=11", "codes.target_support=m/2", "S_cache=5", "train.steps=1")
    run_in(tmp_path, *options, "wandb=offline")
    (init,) = wandb.inits
    assert {key: init["config"][key] for key in ("m", "r", "target_support", "S_cache")} == {
        "m": 4,
        "r": 11,
        "target_support": 2,
        "S_cache": 5,
    }


def test_several_banks_are_kept_apart(tmp_path: Path, wandb: FakeWandb) -> None:
    sink = WandbSink(WandbConfig(mode=WandbMode.offline, group="mine"))
    sink.open(info(tmp_path, "layer001.up", "layer002.up", sweep="ignored"))
    sink.log("layer002.up", 1, {"relfrob": 0.5})
    assert wandb.logged == [{"layer002.up/relfrob": 0.5, "layer002.up/step": 1}]
    assert wandb.metrics["layer001.up/*"] == {"step_metric": "layer001.up/step"}
    assert wandb.inits[0]["group"] == "mine"
    sink.finish({"banks": []}, state="interrupted")
    assert wandb.exit_code == 1


def test_online_without_a_key_stays_offline(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.key = False
    WandbSink(WandbConfig(mode=WandbMode.online)).open(info(tmp_path))
    assert [one["mode"] for one in wandb.inits] == ["offline"]
    assert "no API key" in caplog.text


def test_online_without_a_network_stays_offline(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.online_works = False
    WandbSink(WandbConfig(mode=WandbMode.online)).open(info(tmp_path))
    assert [one["mode"] for one in wandb.inits] == ["online", "offline"]
    assert "out of reach (ConnectionError: no route to host)" in caplog.text


def test_a_missing_wandb_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    sinks = open_sinks(WandbConfig(mode=WandbMode.online), tmp_path / "metrics.jsonl", info(tmp_path))
    sinks.finish({"banks": []}, state="finished")
    assert "WandbSink failed to open" in caplog.text


def test_the_real_wandb_writes_offline_without_key_or_terminal(tmp_path: Path) -> None:
    """As a program of its own: wandb starts a service that outlives a test."""
    code = (
        "import sys; from globe.train import main; sys.argv = ['train', 'train.steps=2', 'model.max_experts=4', "
        "'bank.m=2', 'bank.r=5', 'wandb=online', 'layer=3-4', 'wandb.tags=[a,b]']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
        env=offline_environment(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no API key" in done.stdout
    (run,) = (tmp_path / "outputs").iterdir()
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert load(run / "status.json")["state"] == "finished"


def offline_environment(home: Path) -> dict[str, str]:
    """No key and no mode set, and a home of its own, so that none is found."""
    import os

    kept = {name: value for name, value in os.environ.items() if name not in ("WANDB_API_KEY", "WANDB_MODE")}
    return kept | {"HOME": str(home), "NETRC": str(home / "none"), "WANDB_DIR": ""}


def test_only_the_file_may_stop_a_run(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="metrics"):
        open_sinks(WandbConfig(), tmp_path / "no" / "metrics.jsonl", info(tmp_path))
    assert tracking.WandbMode.disabled is WandbConfig().mode
