"""What GloBE is measured against: published methods and textbook forms, one budget, one interface."""

from globe.baselines.budget import allowed_parameters, resolve_sizes
from globe.baselines.export import to_artefact
from globe.baselines.records import (
    ADAM_METHODS,
    BaselinePoint,
    BaselineResult,
    BaselineSizes,
    BaselineStop,
    Method,
)
from globe.baselines.run import refit_adapters, run_baseline

__all__ = [
    "ADAM_METHODS",
    "BaselinePoint",
    "BaselineResult",
    "BaselineSizes",
    "BaselineStop",
    "Method",
    "allowed_parameters",
    "refit_adapters",
    "resolve_sizes",
    "run_baseline",
    "to_artefact",
]
