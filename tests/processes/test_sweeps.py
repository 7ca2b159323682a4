"""Sweeps as they are typed: launchers, a search, failures, and runs that share a fit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import globe.fit.one_bank
from globe.bank.file import read_artefact
from globe.config.composition import conf_dir, plain
from globe.config.identity import identity
from globe.hf.run_banks import recorded_cache
from run_support import FakeFit, bytes_of, composed, lines, load, run_in

SMALL = ("model.max_experts=4", "bank.m=2", "bank.r=5")


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "globe.train", "-m", *SMALL, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500)


def states(folder: Path) -> dict[str, str]:
    return {file.parent.name: load(file)["state"] for file in folder.glob("*/status.json")}


def ends_in_a_table(shown: str, folder: str, runs: int) -> bool:
    """Does a sweep end with its runs side by side and what comes next, whoever did them?"""
    table = shown[shown.rindex(f"{folder}: {runs} runs") :].splitlines()
    rows = [line for line in table if line.startswith("\u2502")]
    return len(rows) == runs and f"next: python -m globe.report sweep={folder}" in table


# --- launchers ------------------------------------------------------------------------------------------------------


# m/4 of two atoms is half an atom
HALF_FAILS = ("codes.target_support=m/4,m/2", "sweep=s", "train.steps=1", "hydra.launcher.n_jobs=2")
WHY = "codes.target_support='m/4' is 0.5 for m=2, not a whole number: give 1, or round(m/4)"


def test_joblib_does_every_run_and_repeats_only_what_failed(tmp_path: Path) -> None:
    options = ("hydra/launcher=joblib", *HALF_FAILS)
    folder = tmp_path / "outputs" / "s"
    seen = []
    for _ in range(2):
        done = program(*options, cwd=tmp_path)
        assert done.returncode == 1, done.stdout
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1] == WHY
        assert sorted(states(folder).values()) == ["failed", "finished"]
        seen.append({load(file)["state"]: file.read_bytes() for file in folder.glob("*/status.json")})
    assert seen[0]["finished"] == seen[1]["finished"]
    assert seen[0]["failed"] != seen[1]["failed"]


def test_submitit_does_every_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = program("hydra/launcher=submitit_local", *HALF_FAILS, "seed=0,1", cwd=tmp_path)
    folder = tmp_path / "outputs" / "s"
    assert done.returncode == 1, done.stdout
    assert WHY in done.stderr
    assert sorted(states(folder).values()) == ["failed"] * 2 + ["finished"] * 2
    logs = [file.read_text() for file in (folder / ".submitit").glob("*/*_log.out")]
    assert len(logs) == 4
    assert sum("RelFrob" in text for text in logs) == 2
    assert ends_in_a_table(done.stdout, "outputs/s", 2)


_KILLED = """
import os, signal, sys
import globe.fit.one_bank
from hydra.core.hydra_config import HydraConfig
from globe.train import main
fit = globe.fit.one_bank.fit_bank
def fit_or_die(*arguments, **options):
    if "seed=1" in str(HydraConfig.get().job.override_dirname):
        os.kill(os.getpid(), signal.SIGKILL)
    return fit(*arguments, **options)
globe.fit.one_bank.fit_bank = fit_or_die
main()
"""


def test_a_run_that_is_killed_is_one_failed_run_and_goes_on_later(tmp_path: Path) -> None:
    options = [
        *SMALL,
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "seed=0,1,2,3",
        "sweep=s",
        "train.steps=1",
    ]
    command = [sys.executable, "-c", _KILLED, "-m", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert "ended without a result (its process was killed" in done.stderr.splitlines()[-1]
    folder = tmp_path / "outputs" / "s"
    assert sorted(states(folder).values()) == ["finished"] * 3 + ["running"]
    again = program(*options, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("this run is finished already") == 3
    assert list(states(folder).values()) == ["finished"] * 4
    assert ends_in_a_table(again.stdout, "outputs/s", 4)


def test_ray_does_every_run_of_the_ablation_in_two_workers(tmp_path: Path) -> None:
    grid = ("S_cache=all", "bank.r=5,7", "codes.target_support=m/4,m/2", "train.steps=1")
    options = ("experiment=ablation", "hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2", *grid)
    command = [sys.executable, "-m", "globe.train", "-m", "model.max_experts=4", "bank.m=2", *options]
    environment = os.environ | {"HOME": str(tmp_path)}  # where Ray keeps a token
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stdout
    assert "2 runs of outputs/ablation failed, such as " in done.stderr.splitlines()[-1]
    assert WHY in done.stderr
    assert sorted(states(tmp_path / "outputs" / "ablation").values()) == ["failed"] * 2 + ["finished"] * 2
    assert ends_in_a_table(done.stdout, "outputs/ablation", 2)
    assert len(set(re.findall(r"\(_do pid=(\d+)\)", done.stdout + done.stderr))) == 2


def test_the_slurm_launcher_composes_and_writes_a_job_for_sbatch(tmp_path: Path) -> None:
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
    from submitit.slurm.slurm import _make_sbatch_string

    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        node = compose(
            "config",
            overrides=["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"],
            return_hydra_config=True,
        )
    launcher = OmegaConf.to_container(node.hydra.launcher, resolve=True)
    assert isinstance(launcher, dict)
    OmegaConf.merge(OmegaConf.structured(SlurmQueueConf), launcher)  # refuses a key that the plugin lacks
    kept = ("partition", "cpus_per_task", "gpus_per_node", "nodes", "signal_delay_s", "array_parallelism")
    text = _make_sbatch_string(
        "python job.py",
        str(tmp_path),
        map_count=23,
        time=launcher["timeout_min"],
        mem=f"{launcher['mem_gb']}GB",
        ntasks_per_node=launcher["tasks_per_node"],
        **{key: launcher[key] for key in kept},
    )
    for line in ("partition=gpu", "cpus-per-task=4", "gpus-per-node=1", "array=0-22%16", "time=240"):
        assert f"#SBATCH --{line}" in text
    assert launcher["max_num_timeout"] > 0, "a run that hits the limit is queued again"


# --- as a user types it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoke", "minimal", "both_families"])
def test_a_small_experiment_runs_as_it_is(tmp_path: Path, name: str) -> None:
    figure, folder = run_in(tmp_path, f"experiment={name}")
    assert load(folder / "status.json")["state"] == "finished"
    start = max(bank["relfrob_start"] for bank in load(folder / "summary.json")["banks"])
    assert 0 < figure < start


TYPED = {
    "experiment=all_layers": 1,
    "experiment=whole_model": 1,
    "-m experiment=layers": 3,
    "-m experiment=seeding": 15,
    "-m experiment=homotopy": 3,
    "-m experiment=activation": 4,
    "-m experiment=search hydra/sweeper=optuna": 24,
    "-m experiment=ablation": 54,
    "-m experiment=ablation hydra/launcher=joblib": 54,
    "-m experiment=ablation hydra/launcher=submitit_local S_cache=all": 18,
    "-m experiment=ablation hydra/launcher=ray": 54,
}
"""What the pages tell a user to type, and how many runs that makes; each of one step here."""


@pytest.mark.slow
@pytest.mark.parametrize("typed", TYPED)
def test_every_experiment_and_launcher_as_it_is_typed(tmp_path: Path, typed: str) -> None:
    command = [sys.executable, "-m", "globe.train", *typed.split(), "train.steps=1"]
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    folders = [file.parent for file in (tmp_path / "outputs").rglob("status.json")]
    found = [load(folder / "status.json")["state"] for folder in folders]
    assert found.count("finished") == len(found)
    assert len(found) in ((TYPED[typed],) if "search" not in typed else range(12, 25)), (
        "a trial may repeat another"
    )
    if len(found) > 1:
        command = [sys.executable, "-m", "globe.report", f"sweep={folders[0].parent}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rows = 18 if "ablation" in typed else len(found)  # runs that differ in S_cache alone share a row
        assert f"{rows} runs; report.html, report.md" in done.stdout


# --- search ---------------------------------------------------------------------------------------------------------


def test_a_search_minimises_error_and_size(tmp_path: Path) -> None:
    search(tmp_path, times=1)


@pytest.mark.slow
def test_repeating_a_search_fits_nothing_anew(tmp_path: Path) -> None:
    search(tmp_path, times=2)


def search(tmp_path: Path, *, times: int) -> None:
    command = [sys.executable, "-m", "globe.train", "-m", "experiment=search", "hydra/sweeper=optuna"]
    command += ["hydra.sweeper.n_trials=3", "train.steps=1", "model.max_experts=8"]
    done = [
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        for _ in range(times)
    ]
    folder = tmp_path / "outputs" / "search"
    assert [one.returncode for one in done] == [0] * times, done[0].stderr
    found = OmegaConf.load(folder / "optimization_results.yaml")
    figures = {
        (load(file)["relfrob"], load(file)["kept"]): load(file.with_name("summary.json"))
        for file in folder.glob("*/summary.json")
    }
    assert 1 <= len(found.solutions) <= len(figures) <= 3
    for one in found.solutions:
        assert tuple(one["values"]) in figures
    for repeated in done[1:]:
        assert repeated.stdout.count("this run is finished already") == 3


@pytest.mark.slow
def test_a_failed_trial_is_one_less_and_the_exit_code_says_so(tmp_path: Path) -> None:
    options = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "train.steps=1", "sweep=s")
    done = program(*options, "codes.target_support=choice(m/2,m/4)", "seed=choice(0,1)", cwd=tmp_path)
    found = states(tmp_path / "outputs" / "s")
    assert set(found.values()) == {"failed", "finished"}, "else the seed of the sampler no longer shows both"
    assert done.returncode == 1
    assert "of outputs/s failed, such as" in done.stderr.splitlines()[-1]


def test_a_run_returns_the_objectives_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", FakeFit())
    one, folder = run_in(tmp_path, "train.steps=1")
    both, same = run_in(tmp_path, "train.steps=1", "objectives=[kept,relfrob]")
    summary = load(folder / "summary.json")
    assert folder == same
    assert one == summary["relfrob"]
    assert both == (summary["kept"], summary["relfrob"])


# --- one fit for several runs ---------------------------------------------------------------------------------------


def test_runs_that_differ_in_S_cache_share_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = FakeFit()
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", fit)
    options = ("layer=4-5", "bank.r=7", "train.steps=2")
    figure, first = run_in(tmp_path, *options)
    again, second = run_in(tmp_path, *options, "S_cache=3")
    assert fit.fits == 2, "one for each bank"
    assert first != second
    assert again == figure
    assert second.name.endswith(identity(plain(composed(*options))))
    for key in ("layer004.up", "layer005.up"):
        assert bytes_of(first, key) == bytes_of(second, key)
        assert read_artefact(second / "banks" / key).r == 7
    assert lines(second) == lines(first)
    assert sorted(one.name for one in (first / "banks").iterdir()) == sorted(
        one.name for one in (second / "banks").iterdir()
    )
    summaries = [load(folder / "summary.json") for folder in (first, second)]
    assert [one["S_cache"] for one in summaries] == ["all", 3]
    # bases of r x d = 7 x 64 in bfloat16, of 16 experts or of 3
    assert [one["cache_bytes"]["layer004.up"] for one in summaries] == [16 * 7 * 64 * 2, 3 * 7 * 64 * 2]
    assert [recorded_cache(folder) for folder in (first, second)] == ["all", 3]
    assert recorded_cache(second / "banks" / "layer004.up") == 3
    third, _ = run_in(tmp_path, *options, "S_cache=0", "overwrite=true")
    assert (third, fit.fits) == (figure, 4), "a fit that is asked for anew is done anew"


def test_the_same_folder_with_another_S_cache_is_recorded_and_not_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = FakeFit()
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", fit)
    for cache in ("all", "5"):
        globe.train.run(composed("train.steps=1", f"S_cache={cache}"), tmp_path / "here")
    assert fit.fits == 1
    assert recorded_cache(tmp_path / "here") == 5


def test_an_unfinished_twin_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = FakeFit()
    monkeypatch.setattr(globe.fit.one_bank, "fit_bank", fit)
    _, first = run_in(tmp_path, "train.steps=1")
    status = load(first / "status.json") | {"state": "interrupted"}
    (first / "status.json").write_text(json.dumps(status))
    run_in(tmp_path, "train.steps=1", "S_cache=3")
    assert fit.fits == 2


def test_a_fit_that_another_process_does_is_waited_for(tmp_path: Path) -> None:
    """The first holds the fit until the second has said that it waits."""
    first = (
        "import sys; from pathlib import Path; from globe.processes.sweep import one_at_a_time\n"
        "with one_at_a_time(Path('.'), 'abc'):\n"
        "    Path('held').touch(); sys.stdin.readline(); Path('done').touch()"
    )
    second = (
        "import logging; from pathlib import Path; from globe.processes.sweep import one_at_a_time\n"
        "logging.basicConfig(level='INFO', format='%(message)s')\n"
        "with one_at_a_time(Path('.'), 'other'): print(Path('done').exists())\n"
        "with one_at_a_time(Path('.'), 'abc'): print(Path('done').exists())"
    )
    pipes = {"cwd": tmp_path, "text": True, "stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", first], **pipes) as holder:
        while not (tmp_path / "held").exists():
            assert holder.poll() is None
            time.sleep(0.01)
        with subprocess.Popen([sys.executable, "-c", second], stdout=subprocess.PIPE, **pipes) as waiter:
            assert waiter.stderr is not None
            assert waiter.stderr.readline() == "waiting for another process that does the same fit (abc)\n"
            holder.communicate("go on\n", timeout=60)
            told, _ = waiter.communicate(timeout=60)
    assert told.split() == ["False", "True"]
