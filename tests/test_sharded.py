"""Experts shared out over 2 and 4 processes of torchrun give what one process gives, and all end together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from run_support import change_tensor, composed, lines, load, run_in, small_checkpoint

sys.path.insert(0, str(Path(__file__).parent / "am"))
import sharded_worker

import globe.learn
from globe.am.ranks import ALONE
from globe.artefact import read_artefact
from globe.checkpoint import open_checkpoint
from globe.config import to_config
from globe.errors import ConfigError
from globe.torchrun import refuse

FIT = (
    *("layer=3", "model.max_experts=7", "bank.m=3", "bank.r=11", "codes.target_support=2", "codes.every=2"),
    *("train.steps=8", "train.patience=0", "train.evaluate_every=2", "train.curvature_dtype=same"),
)


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *launch, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return sharded_worker.all_fits(ALONE)


@pytest.fixture(scope="module", params=[2, 4])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    done = torchrun(request.param, sharded_worker.__file__, str(folder))
    assert done.returncode == 0, done.stderr
    return sharded_worker.read(folder)


def largest_gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_ranks_together_make_the_fits_of_one(
    alone: dict[str, dict[str, Any]], together: dict[str, dict[str, Any]]
) -> None:
    assert set(together) == set(alone)
    for name, one in alone.items():
        tolerance = 1e-5 if name == "float32" else 1e-9
        many = together[name]
        assert many["relfrob"] == pytest.approx(one["relfrob"], rel=tolerance), name
        assert many["supports"] == one["supports"], name
        for mine, theirs in zip(many["decisions"], one["decisions"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5), name
        for part in ("bank", "codes", "adapters"):
            assert largest_gap(many[part], one[part]) < (10 if part == "bank" else 100) * tolerance, (
                name,
                part,
            )
        assert many["apart"] == 0, f"ranks hold different banks: {name}"


def test_the_fits_compared_differ_in_what_they_decide(alone: dict[str, dict[str, Any]]) -> None:
    """Else equal figures would show little."""
    medians = {name: one["supports"][-1][0] for name, one in alone.items()}
    assert medians["silu, target support"] == 2 < min(medians["linear"], medians["tanh, low-rank atoms"])
    assert alone["resumed"]["relfrob"] == alone["silu, target support"]["relfrob"][3:]


def test_a_run_by_two_processes_goes_on_where_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relfrob, whole = run_in(tmp_path / "whole", *FIT)
    fit_bank = globe.learn.fit_bank

    def cut_off(*args: Any, on_step: Any, **kwargs: Any) -> Any:
        def stopping(record: Any) -> None:
            on_step(record)
            if record.step == 4:
                raise KeyboardInterrupt

        return fit_bank(*args, on_step=stopping, **kwargs)

    monkeypatch.setattr(globe.learn, "fit_bank", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "parted", *FIT, "train.checkpoint_every=0")
    (folder,) = (tmp_path / "parted").iterdir()
    done = torchrun(2, "-m", "globe.train", *FIT, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert load(folder / "status.json")["state"] == "finished"
    assert load(folder / "summary.json")["relfrob"] == pytest.approx(relfrob, rel=1e-5)
    assert [line["step"] for line in lines(folder)] == list(range(1, 9))
    key = "layer003.up"
    found, wanted = (read_artefact(one / "banks" / key) for one in (folder, whole))
    assert found.bank is not None
    assert wanted.bank is not None
    assert found.bank.shape == wanted.bank.shape
    assert largest_gap(found.bank.float(), wanted.bank.float()) < 1e-2  # bfloat16
    mine, theirs = ((one.metrics or {}) for one in (found, wanted))
    assert mine["expert_relfrob"] == pytest.approx(theirs["expert_relfrob"], rel=1e-3)
    assert set(mine["metrics"]) == set(theirs["metrics"])
    for name in (
        "global_mean",
        "effective_rank_mean",
        "energy_captured",
        "support_median",
        "explained_variance",
    ):
        assert mine["metrics"][name] == pytest.approx(theirs["metrics"][name], rel=1e-4, abs=1e-6), name
    assert done.stdout.count("layer003.up: RelFrob") == 1  # one process speaks


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
