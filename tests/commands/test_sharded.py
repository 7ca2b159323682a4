"""Experts shared out over 2 and 4 processes of torchrun give what one process gives, and all end together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dying_run import LAST_STEP
from run_support import change_tensor, composed, lines, load, run_in, small_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "am"))
import sharded_worker

from globe.bank.file import read_artefact
from globe.checkpoint import open_checkpoint
from globe.config.composition import to_config
from globe.errors import ConfigError
from globe.numerics.group import ALONE
from globe.processes.torchrun import own_device, refuse, refuse_sweep

KEY = "layer003.up+gate"
FIT = (
    *("layer=3", "family=both", "bank.scope=families", "model.max_experts=7", "bank.m=3", "bank.r=11"),
    *("codes.target_support=2", "codes.every=2", "normalise.centre=expert_mean", "normalise.scale=row"),
    *("train.steps=14", "train.patience=0", "train.evaluate_every=2", "train.checkpoint_every=0"),
    *("calibrate.text=embedded", "calibrate.tokens=512", "calibrate.window=64"),
    *("dtype=float64", "export_dtype=float32"),
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *launch, *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return sharded_worker.all_fits(ALONE, 1)


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of 2 and of 4 processes, started by one that imports for all."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, sharded_worker.__file__, str(folder), "2", "4"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(params=[2, 4])
def together(request: pytest.FixtureRequest, fits: Path) -> dict[str, dict[str, Any]]:
    return sharded_worker.read(sharded_worker.file_of(fits, request.param))


def largest_gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_ranks_together_make_the_fits_of_one(
    alone: dict[str, dict[str, Any]], together: dict[str, dict[str, Any]]
) -> None:
    assert set(together) <= set(alone)
    assert {"silu, target support", "tanh, low-rank atoms", "tanh, low-rank atoms, float32"} <= set(together)
    for name, many in together.items():
        one, single = alone[name], "float32" in name
        assert many["relfrob"][-1] == pytest.approx(one["relfrob"][-1], abs=1e-5 if single else 1e-10), name
        # steps on the way, and factors, which a small change of the objective moves further
        assert many["relfrob"] == pytest.approx(one["relfrob"], abs=1e-4 if single else 1e-9), name
        for mine, theirs in zip(many["decisions"], one["decisions"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4 if single else 1e-9), name
        for part in ("bank", "codes", "adapters"):
            assert largest_gap(many[part], one[part]) < (1e-2 if single else 1e-8), (name, part)
        assert many["captured"] == pytest.approx(one["captured"], rel=1e-6), name
        assert many["supports"] == one["supports"], name
        assert many["apart"] == 0, f"ranks hold different banks: {name}"


def test_the_fits_compared_differ_in_what_they_decide(alone: dict[str, dict[str, Any]]) -> None:
    """Else equal figures would show little."""
    medians = {name: one["supports"][-1][0] for name, one in alone.items()}
    assert medians["silu, target support"] == 2 < min(medians["linear"], medians["tanh, low-rank atoms"])
    assert alone["resumed"]["relfrob"] == alone["silu, target support"]["relfrob"][3:]


@pytest.mark.slow
def test_a_run_goes_on_with_more_processes_where_one_of_two_was_killed(tmp_path: Path) -> None:
    """Two members, each of which some process holds nothing of; experts, means and scales come together at the end."""
    fit = (*FIT, f"output={tmp_path}")
    relfrob, whole = run_in(tmp_path / "whole", *fit)
    folder = tmp_path / "parted"
    dying = torchrun(2, str(Path(__file__).parents[1] / "dying_run.py"), *fit, f"hydra.run.dir={folder}")
    assert dying.returncode != 0
    assert dying.stderr.count(sentence := "another process of this fit was killed") == 1, dying.stderr
    status = load(folder / "status.json")
    assert status["state"] == "failed"
    assert sentence in status["error"]
    assert len(lines(folder)) == LAST_STEP
    done = torchrun(4, "-m", "globe.train", *fit, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "going on after step" in done.stdout
    assert done.stdout.count(f"{KEY}: RelFrob") == 1  # one process speaks
    assert load(folder / "status.json")["state"] == "finished"
    assert load(folder / "summary.json")["relfrob"] == pytest.approx(relfrob, abs=1e-6)
    assert [line["step"] for line in lines(folder)] == list(range(1, 15))
    found, wanted = (read_artefact(one / "banks" / KEY) for one in (folder, whole))
    for part in ("bank", "codes", "adapters", "mean"):
        mine, theirs = getattr(found, part), getattr(wanted, part)
        assert mine.shape == theirs.shape
        assert largest_gap(mine, theirs) < 1e-4, part
    mine, theirs = ((one.metrics or {}) for one in (found, wanted))
    assert mine["expert_relfrob"] == pytest.approx(theirs["expert_relfrob"], rel=1e-4)
    assert set(mine["metrics"]) == set(theirs["metrics"])
    for name in (
        "global_mean",
        "effective_rank_mean",
        "energy_captured",
        "explained_variance",
        "relfrob_metric",
    ):
        assert mine["metrics"][name] == pytest.approx(theirs["metrics"][name], rel=1e-4, abs=1e-6), name


def test_the_failure_of_one_process_is_one_sentence_and_ends_all(tmp_path: Path) -> None:
    """The last expert is read by the second process alone."""
    checkpoint = small_checkpoint(tmp_path / "model")

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        broken = tensor.clone()
        broken[-1] = torch.nan
        return broken

    source = open_checkpoint(str(checkpoint))
    place = source.locate(3, "up", source.shape(3, "up").n - 1)
    change_tensor(checkpoint, place.tensor, spoil)
    folder = tmp_path / "run"
    options = (f"model.path={checkpoint}", "layer=3", "bank.m=3", "bank.r=11", "train.steps=2")
    done = torchrun(2, "-m", "globe.train", *options, f"hydra.run.dir={folder}")
    assert done.returncode != 0
    assert done.stderr.count("holds NaN or infinite weights") == 1, done.stderr
    status = load(folder / "status.json")
    assert status["state"] == "failed"
    assert "holds NaN or infinite weights" in status["error"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["bank.kept=0.5"], "bank.kept"),
        (["bank.bits=3"], "bank.bits"),
        (["model.size=8MB"], "model.size"),
        (["method=mobe"], "method=mobe"),
        (["init=kmeans"], "init.seeding=kmeans"),
        (["train.dictionary=mod"], "train.dictionary=mod"),
        (["schedule=warm_targets"], "schedule.beta"),
        (["dry_run=true"], "dry_run"),
    ],
)
def test_what_needs_all_experts_in_one_process_is_refused(options: list[str], named: str) -> None:
    refuse(to_config(composed("layer=3")))
    with pytest.raises(ConfigError, match=named):
        refuse(to_config(composed(*options)))


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_sweep_is_refused(flag: str) -> None:
    refuse_sweep(["train.py", "layer=3"])
    with pytest.raises(ConfigError, match="a sweep is not possible"):
        refuse_sweep(["train.py", flag, "layer=3,4"])


@pytest.fixture
def two_here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The second of two processes on a machine, which sees two CUDA devices."""
    for name, value in (("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


def test_each_process_of_a_machine_takes_a_device(two_here: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    two_here.setattr(torch.cuda, "set_device", taken.append)
    assert own_device(to_config(composed("layer=3"))) == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)]
    assert own_device(to_config(composed("layer=3", "device=cpu"))) == torch.device("cpu")


def test_more_processes_than_devices_are_refused(two_here: pytest.MonkeyPatch) -> None:
    two_here.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match=r"2 processes on a machine with 1 CUDA devices.*--nproc-per-node=1"
    ):
        own_device(to_config(composed("layer=3")))


@pytest.mark.gpu
@pytest.mark.slow
def test_a_run_on_as_many_devices_as_there_are_is_that_of_one(tmp_path: Path) -> None:
    """NCCL with two devices or more; with one, what the user is told."""
    count = torch.cuda.device_count()
    folder, options = tmp_path / "together", (*FIT, "device=cuda")
    relfrob, _ = run_in(tmp_path / "alone", *options)
    done = torchrun(max(2, count), "-m", "globe.train", *options, f"hydra.run.dir={folder}")
    if count == 1:
        assert done.returncode != 0
        assert done.stderr.count("2 processes on a machine with 1 CUDA devices") == 1, done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert load(folder / "summary.json")["relfrob"] == pytest.approx(relfrob, abs=1e-5)
