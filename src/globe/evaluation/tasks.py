"""lm-eval tasks on a model in memory. lm-eval is an extra (`eval`) and is imported here alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from globe.errors import ConfigError


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Return task -> metric -> value, as lm-eval names them (`acc,none`); standard errors among them.

    `include_path` is a folder of task files of one's own, with which nothing has to be downloaded; `limit`
    is a number of examples per task. Raises ConfigError if lm-eval is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"tasks={_listed(tasks)} needs lm-eval ({error}): pip install 'globe-moe[eval]', or leave tasks out"
        ) from error
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path={include_path!r} is not a folder: give the one with your task files")
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"tasks={_listed(unknown)} is not known to lm-eval: correct the name, or give include_path"
        )
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def check_tasks(tasks: Sequence[str], include_path: str | None) -> None:
    """Raise ConfigError early, before anything is measured, if there is no lm-eval to run the tasks."""
    if not tasks:
        if include_path is not None:
            raise ConfigError(f"include_path={include_path!r} is for tasks: give tasks=[...] as well")
        return
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"tasks={_listed(tasks)} needs lm-eval: pip install 'globe-moe[eval]', or leave tasks out"
        )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    # metrics are named `acc,none`, by their filter; beside them stand counts such as sample_len
    numbers = {
        name: value for name, value in metrics.items() if "," in name and isinstance(value, int | float)
    }
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def _listed(tasks: Sequence[str]) -> str:
    return f"[{','.join(tasks)}]"
