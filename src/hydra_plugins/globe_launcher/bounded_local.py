"""submitit's local launcher with a bound on the runs at once. Hydra looks for plugins under `hydra_plugins` only.

Its own launcher starts all runs of a sweep together, whatever the machine, shows them no GPU unless told how many
there are, and gives up on the sweep when one process dies.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

from hydra.core.utils import JobReturn

from hydra_plugins.globe_launcher.results import reason_of, without_result

if find_spec("hydra_plugins.hydra_submitit_launcher") is not None:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import LocalLauncher

    class BoundedLocalLauncher(LocalLauncher):
        """Every run in a process of its own, `n_jobs` of them at once (-1: one per core)."""

        def __init__(self, *, n_jobs: int = -1, **params: Any) -> None:
            super().__init__(**params)
            self.n_jobs = n_jobs

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            from globe.config.launchers import cores, jobs_at_once, remember_gpus

            if self.params.get("gpus_per_node") is None:
                remember_gpus(
                    os.environ
                )  # each run sees them all, and picks its own; submitit would hide them
            at_once = jobs_at_once({"n_jobs": self.n_jobs}, cores())
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            with ThreadPoolExecutor(at_once) as pool:
                return list(pool.map(self._one, job_overrides, numbers))

        def _one(self, overrides: Sequence[str], number: int) -> JobReturn:
            try:
                return super().launch([overrides], number)[0]
            except Exception as error:  # the process died; of many kinds, and the other runs go on
                return without_result(number, overrides, reason_of(error))
