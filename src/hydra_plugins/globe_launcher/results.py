"""What all launchers do: one run in the process that it is given, and a result in the place of a run that was lost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.errors import CompactHydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runs:
    """The runs of a sweep: what Hydra hands a launcher, and all that a process needs to do one of them."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction
    state: dict[Any, Any]
    """of Hydra's singletons"""

    def do(self, number: int, overrides: Sequence[str]) -> JobReturn:
        """Do one run and return what sweepers look at, without its configurations, whose classes pickle can't send."""
        setup_globals()
        Singleton.set_state(self.state)
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        done = run_job(
            hydra_context=self.context,
            config=config,
            task_function=self.task,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        return replace(done, cfg=None, hydra_cfg=None)


def without_result(number: int, overrides: Sequence[str], reason: str) -> JobReturn:
    """Return the result of a failed run; its sentence is logged now, and raised by Hydra when all are done."""
    _log.error("run %d ended without a result: %s", number, reason)
    result = JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
    result.return_value = CompactHydraException(
        f"run {number} ({' '.join(overrides)}) ended without a result ({reason}): the same command goes on from there"
    )
    return result


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
