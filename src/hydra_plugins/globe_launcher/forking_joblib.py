"""joblib's launcher with runs that start at once: each is a fork of the command, which has imported PyTorch already.

Its own launcher (hydra-joblib-launcher) starts new Pythons, each of which imports PyTorch anew (3 s of a core), hands
them run after run, and gives up on the sweep when one of them is killed. A fork starts in milliseconds, shares the
memory of what is imported, and ends with its run: one that is killed is one failed run.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, filter_overrides
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.globe_launcher.results import Runs, without_result

_log = logging.getLogger(__name__)
_REMEMBERED = 400
"""Configurations at most that are kept for forks: a third of a MB each, and 0.1 s to compose."""


class Remembering:
    """Hydra's loader of configurations, for forks: they take over what was composed to check the sweep.

    Hydra composes every run once before a launcher is given any, and a launcher composes it again.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        run = tuple(sweep_overrides)
        if (known := self._composed.pop(run, None)) is not None:  # whoever gets it may change it
            return known
        composed = self._loader.load_sweep_config(master_config, sweep_overrides)
        if len(self._composed) < _REMEMBERED:
            self._composed[run] = copy.deepcopy(composed)
        return composed

    def forget(self) -> None:
        self._composed.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


if find_spec("hydra_plugins.hydra_joblib_launcher") is not None:
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher

    class ForkingJoblibLauncher(JoblibLauncher):
        """Every run in a process of its own, `n_jobs` of them at once (-1: one per core), handed out by joblib.

        With `fork=False`, and where forking is not safe, the runs are handed to joblib's own worker processes.
        """

        def __init__(self, *, fork: bool = True, **params: Any) -> None:
            super().__init__(**params)
            self.fork = fork

        def setup(
            self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
        ) -> None:
            from globe.processes.forks import can_fork

            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
            self.fork = self.fork and can_fork()
            if self.fork:
                self.composed = hydra_context.config_loader = Remembering(hydra_context.config_loader)

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            from globe.processes.forks import Forks, LostProcessError, shared_memory

            if not self.fork:
                return super().launch(job_overrides, initial_job_idx)
            from joblib import Parallel, delayed

            assert self.config is not None
            assert self.hydra_context is not None
            assert self.task_function is not None
            configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
            runs = Runs(self.hydra_context, self.config, self.task_function, Singleton.get_state())
            timeout, forks = self.joblib.get("timeout"), Forks()

            def one(number: int, overrides: Sequence[str]) -> JobReturn:
                try:
                    return forks.call(partial(runs.do, number, overrides), timeout=timeout)
                except LostProcessError as lost:
                    reason = str(lost)
                except TimeoutError:
                    reason = f"the {timeout:g} seconds of hydra.launcher.timeout are over"
                return without_result(number, overrides, reason)

            jobs = list(enumerate(job_overrides, initial_job_idx))
            for number, overrides in jobs:
                _log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
            options = {key: self.joblib[key] for key in ("n_jobs", "verbose") if key in self.joblib}
            with shared_memory():
                try:
                    # its threads only wait, each for the process of its run
                    threads = Parallel(**options, backend="threading", pre_dispatch="n_jobs", batch_size=1)
                    return threads(delayed(one)(*job) for job in jobs)
                finally:
                    forks.end()
                    self.composed.forget()
