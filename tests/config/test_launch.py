"""How the runs of a sweep share a machine, and what a launcher or sweeper that is not installed says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from globe.config.commands import explain
from globe.config.composition import conf_dir
from globe.config.launchers import (
    EXTRAS,
    cores,
    device_of_job,
    jobs_at_once,
    recall_gpus,
    remember_gpus,
    threads_per_job,
)
from globe.processes import sweep

LAUNCHERS = sorted(path.stem for path in (Path(conf_dir()) / "hydra" / "launcher").glob("*.yaml"))


def test_every_promised_launcher_is_there() -> None:
    assert LAUNCHERS == ["joblib", "ray", "submitit_local", "submitit_slurm"]


@given(n_jobs=st.integers(-20, 20).filter(lambda n: n != 0), available=st.integers(1, 16))
def test_runs_at_once_never_take_more_threads_than_there_are_cores(n_jobs: int, available: int) -> None:
    launcher = {"n_jobs": n_jobs}
    jobs, threads = jobs_at_once(launcher, available), threads_per_job(launcher, available)
    assert jobs >= 1
    assert threads is not None
    assert threads >= 1
    assert jobs * threads <= max(available, jobs)


@pytest.mark.parametrize(
    ("launcher", "jobs", "threads"),
    [
        ({}, 1, None),
        ({"n_jobs": -1}, 12, 1),
        ({"n_jobs": -2}, 11, 1),
        ({"n_jobs": 1}, 1, 12),
        ({"n_jobs": 5}, 5, 2),
        ({"n_jobs": 40}, 40, 1),
        ({"cpus_per_task": 4}, 1, 4),
        ({"ray": {"init": {}, "remote": {"num_cpus": 3}}}, 4, 3),
        ({"ray": {"init": {"num_cpus": 7}, "remote": {"num_cpus": 3}}}, 2, 3),
        ({"ray": {"init": {"num_cpus": 1}, "remote": {"num_cpus": 3}}}, 1, 3),
        ({"ray": {"init": None, "remote": None}}, 12, 1),
        ({"ray": {"init": {"address": "auto"}, "remote": {"num_cpus": 3}}}, 1, 3),
    ],
)
def test_jobs_and_threads_on_twelve_cores(
    launcher: dict[str, object], jobs: int, threads: int | None
) -> None:
    assert (jobs_at_once(launcher, 12), threads_per_job(launcher, 12)) == (jobs, threads)


def test_gpus_go_round() -> None:
    assert [device_of_job(number, 3, at_once=2) for number in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert device_of_job(5, 1, at_once=4) is None
    assert device_of_job(5, 0, at_once=4) is None
    assert device_of_job(5, 3, at_once=1) is None, "runs that follow each other stay where they are"


@pytest.mark.parametrize("before", [None, "", "3,5"])
def test_gpus_that_a_launcher_hides_come_back(before: str | None) -> None:
    environment = {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
    as_it_was = dict(environment)
    remember_gpus(environment)
    environment["CUDA_VISIBLE_DEVICES"] = "hidden"
    recall_gpus(environment)
    assert environment == as_it_was
    recall_gpus(environment)
    assert environment == as_it_was


def test_a_job_takes_its_share_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(sweep, "cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        with sweep.share_of_machine(OmegaConf.create({"n_jobs": 4}), 3, "auto"):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 6
        with sweep.share_of_machine(OmegaConf.create({"n_jobs": 1}), 3, "auto"):
            assert torch.get_num_threads() == 6, (
                "OMP_NUM_THREADS or the caller asked for fewer than there are"
            )
        with sweep.share_of_machine(OmegaConf.create({"n_jobs": 4}), 3, "cpu"):
            pass
        with sweep.share_of_machine(OmegaConf.create({}), 0, "auto"):
            assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)
    assert chosen == [1]


def test_cores_are_those_that_may_be_used() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from globe.config.launchers import cores; print(cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1", done.stderr
    assert cores() >= 1


def test_a_configuration_that_was_composed_to_be_checked_is_composed_once() -> None:
    from hydra_plugins.globe_launcher.forking_joblib import Remembering

    class Loader:
        composed: ClassVar[list[str]] = []
        other = 3

        def load_sweep_config(self, master: DictConfig, overrides: list[str]) -> DictConfig:
            self.composed.append(overrides[0])
            return OmegaConf.create({"run": overrides[0]})

    master, loader = OmegaConf.create(), Remembering(Loader())  # type: ignore[arg-type]
    loader.load_sweep_config(master, ["m=2"]).run = "changed"
    loader.load_sweep_config(master, ["m=3"])
    assert loader.load_sweep_config(master, ["m=2"]) == {"run": "m=2"}
    assert Loader.composed == ["m=2", "m=3"]
    loader.load_sweep_config(master, ["m=2"])
    loader.forget()
    loader.load_sweep_config(master, ["m=3"])
    assert Loader.composed == ["m=2", "m=3", "m=2", "m=3"]
    assert loader.other == 3


# --- what is not installed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", sorted(set(EXTRAS.values())))
def test_a_plugin_that_is_missing_is_one_sentence_that_names_its_extra(extra: str) -> None:
    plugin = next(module for module, name in EXTRAS.items() if name == extra)
    sentence = explain(RuntimeError(f"Unknown plugin class : 'hydra_plugins.{plugin}.Y'"))
    assert sentence is not None
    assert sentence.endswith(f"needs a plugin that is not installed: pip install 'globe-moe[{extra}]'")
    assert explain(RuntimeError("Unknown plugin class : 'hydra_plugins.elsewhere.x.Y'")) is None


def test_without_plugins_the_typed_command_says_which_extra_to_install(tmp_path: Path) -> None:
    # the plugins are there when the tests run: an empty package of the name hides them from Hydra
    code = """
import sys, types
hidden = types.ModuleType("hydra_plugins")
hidden.__path__ = []
sys.modules["hydra_plugins"] = hidden
from globe.train import main
for option in ("hydra/launcher=joblib", "hydra/launcher=submitit_slurm", "hydra/launcher=ray", "experiment=search"):
    sys.argv = ["train", "-m", "train.steps=1", option]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 1
    else:
        raise AssertionError("it ran")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert [line.rpartition("install ")[2] for line in said] == [
        f"'globe-moe[{extra}]'" for extra in ("joblib", "submitit", "ray", "optuna")
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_extra_of_every_launcher_is_known(name: str) -> None:
    target = OmegaConf.load(Path(conf_dir()) / "hydra" / "launcher" / f"{name}.yaml")._target_
    package, _, module = target.rpartition(".")[0].partition(".")
    assert package == "hydra_plugins"
    assert EXTRAS[module] == name.partition("_")[0]


def test_a_worker_that_was_killed_is_one_sentence() -> None:
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    assert "most likely for want of memory" in str(explain(TerminatedWorkerError("gone")))
