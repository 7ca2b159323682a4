"""Runs as tasks of Ray, on this machine or on a cluster that is there already.

Ray needs no more than this. The launcher of others (hydra-ray-launcher 1.2) also asks for a cloud's client, and for a
cloudpickle so old that submitit and Ray itself can't be installed with it from exact versions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.globe_launcher.results import Runs, reason_of, without_result

_log = logging.getLogger(__name__)


def _do(runs: Runs, folder: str, number: int, overrides: Sequence[str]) -> JobReturn:
    """A task: the run, in the folder of who started the sweep. Every machine has to see that one."""
    os.chdir(folder)
    return runs.do(number, overrides)


if find_spec("ray") is not None:

    class RayLauncher(Launcher):
        """Every run as a task, in a worker process of Ray's.

        `ray.init` are the options of `ray.init`, `ray.remote` those of a task; `num_gpus` null is one where Ray has
        any.
        """

        def __init__(self, ray: Mapping[str, Any]) -> None:
            options = OmegaConf.to_container(ray, resolve=True) if OmegaConf.is_config(ray) else dict(ray)
            assert isinstance(options, dict)
            self.init: dict[str, Any] = options.get("init") or {}
            self.remote: dict[str, Any] = options.get("remote") or {}

        def setup(
            self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
        ) -> None:
            self.context, self.task, self.config = hydra_context, task_function, config

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
            os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # runs print alike, and each its own numbers
            import ray

            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
            if not ray.is_initialized():  # a search launches again and again
                ray.init(**self.init)
            limits = dict(self.remote)
            if limits.get("num_gpus") is None:
                limits["num_gpus"] = int(ray.cluster_resources().get("GPU", 0) > 0)
            runs = ray.put(Runs(self.context, self.config, self.task, Singleton.get_state()))
            task = ray.remote(**limits)(_do)
            jobs, pending = list(enumerate(job_overrides, initial_job_idx)), []
            for number, overrides in jobs:
                _log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
                pending.append(task.remote(runs, os.getcwd(), number, list(overrides)))
            done = []
            for (number, overrides), one in zip(jobs, pending, strict=True):
                try:
                    done.append(ray.get(one))
                except ray.exceptions.RayError as error:  # its process or machine was lost; the others go on
                    done.append(without_result(number, overrides, reason_of(error)))
            return done
