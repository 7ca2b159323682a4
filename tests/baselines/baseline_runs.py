"""One call that resolves sizes and limits as the tests of the baselines name them, and runs the method."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from globe.baselines import BaselineResult, Limits, resolve_sizes, run_baseline
from globe.config.choices import Method

SIZES = ("budget", "m", "r", "atom_rank")
LIMITS = ("steps", "seconds", "on_step", "clock")


def run(method: Method | str, X: Tensor, **options: Any) -> BaselineResult:
    sizes, limits = (
        {name: options.pop(name) for name in names if name in options} for names in (SIZES, LIMITS)
    )
    n, p, d = X.shape
    return run_baseline(X, resolve_sizes(method, n=n, p=p, d=d, **sizes), Limits(**limits), **options)
