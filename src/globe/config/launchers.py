"""How the runs of a sweep share a machine: jobs at once, threads and device of each. Pure functions; no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from omegaconf import Container, OmegaConf

_GPUS, _ALL = "GLOBE_VISIBLE_GPUS", "all"
RUNS, SWEPT = "GLOBE_SWEEP_RUNS", "GLOBE_SWEEP_OPTIONS"
"""Variables that tell the jobs of a sweep how many they are and which options differ between them."""
EXTRAS = {
    "globe_launcher.forking_joblib": "joblib",
    "globe_launcher.bounded_local": "submitit",
    "hydra_submitit_launcher.submitit_launcher": "submitit",
    "globe_launcher.ray_tasks": "ray",
    "hydra_optuna_sweeper.optuna_sweeper": "optuna",
}
"""Module of each plugin of Hydra that `conf/hydra` names, and the extra that installs it or what it needs."""


def plain_options(launcher: Container) -> dict[str, Any]:
    """Return the options of a launcher as plain values."""
    found = OmegaConf.to_container(launcher, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def cores() -> int:
    """Return how many cores this process may use, which a scheduler or `taskset` may have cut down."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def jobs_at_once(launcher: Mapping[str, Any], available: int) -> int:
    """Return how many runs a launcher has going at once on a machine of `available` cores.

    `n_jobs` counts as in joblib: -1 is one per core, -2 one fewer, never less than one. A Ray of this machine fills
    its cores. Without either, runs go one after another (basic), or a cluster decides (slurm, a Ray that is joined).
    """
    asked = launcher.get("n_jobs")
    if "ray" in launcher and not (init := launcher["ray"].get("init") or {}).get("address"):
        return max(1, int(init.get("num_cpus") or available) // _reserved(launcher))
    if asked is None:
        return 1
    return max(1, available + 1 + int(asked) if int(asked) < 0 else int(asked))


def threads_per_job(launcher: Mapping[str, Any], available: int) -> int | None:
    """Return the threads of one run, so that runs do not fight for cores; None leaves it to PyTorch.

    A share of the cores where runs share a machine, what was reserved (`cpus_per_task`, `ray.remote.num_cpus`, or
    ray's one) where a cluster hands out cores, and nothing to say where runs follow each other.
    """
    if launcher.get("n_jobs") is not None:
        return max(1, available // jobs_at_once(launcher, available))
    if launcher.get("cpus_per_task") is not None:
        return int(launcher["cpus_per_task"])
    if "ray" in launcher:
        return _reserved(launcher)
    return None


def _reserved(launcher: Mapping[str, Any]) -> int:
    """Return the cores that a task of Ray reserves, as its launcher is told; Ray's own default is one."""
    remote = launcher["ray"].get("remote") or {}
    return max(1, int(remote.get("num_cpus") or 1))


def device_of_job(number: int, devices: int, *, at_once: int) -> int | None:
    """Return the index of the GPU for the run `number`, in turn; None where there is one GPU, or one run at once."""
    return number % devices if devices > 1 and at_once > 1 else None


def remember_gpus(environment: MutableMapping[str, str]) -> None:
    """Note the GPUs that are visible here, for processes that a launcher hides them from."""
    environment[_GPUS] = environment.get("CUDA_VISIBLE_DEVICES", _ALL)


def recall_gpus(environment: MutableMapping[str, str]) -> None:
    """Make visible what `remember_gpus` noted, before CUDA starts."""
    noted = environment.pop(_GPUS, None)
    if noted == _ALL:
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    elif noted is not None:
        environment["CUDA_VISIBLE_DEVICES"] = noted
