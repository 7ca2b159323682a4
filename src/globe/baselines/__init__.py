"""What GloBE is measured against: published methods and textbook forms, one budget, one interface."""

from globe.baselines.adam import Limits
from globe.baselines.budget import allowed_parameters, resolve_sizes
from globe.baselines.records import BaselinePoint, BaselineResult, BaselineSizes
from globe.baselines.run import run_baseline

__all__ = [
    "BaselinePoint",
    "BaselineResult",
    "BaselineSizes",
    "Limits",
    "allowed_parameters",
    "resolve_sizes",
    "run_baseline",
]
