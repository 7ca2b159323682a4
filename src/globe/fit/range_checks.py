"""Refuse experts and figures that leave the range of floating-point numbers, before they are taken for results."""

from __future__ import annotations

import json

import torch

from globe.config.choices import Scale
from globe.config.schema import Config
from globe.errors import CheckpointError, FitError
from globe.fit.normalise import Joined
from globe.fit.reading import DTYPES
from globe.runs.summary import BankReport


def require_range(config: Config, joined: Joined) -> None:
    """Raise CheckpointError if squares of experts that are not scaled leave the range of the fit's dtype."""
    if config.normalise.scale is not Scale.none:
        return
    numbers = torch.finfo(DTYPES[config.dtype])
    largest = max((float(joined.experts[at].abs().max()) for at in range(len(joined.experts))), default=0.0)
    smallest_square, largest_square = numbers.tiny / numbers.eps, numbers.max * numbers.eps
    if largest and not smallest_square < largest**2 < largest_square:
        raise CheckpointError(
            f"the largest entry is {largest:.1e}, whose square {config.dtype} can't hold: "
            "give normalise.scale=family, or dtype=float64"
        )


def require_finite(report: BankReport) -> None:
    """Raise FitError if a figure of a bank is not finite, so that the other banks of the run go on."""
    try:
        json.dumps(report.to_dict(), allow_nan=False)
    except ValueError as error:
        raise FitError(
            "its figures are not finite: give dtype=float64, another export_dtype or normalise.scale=family"
        ) from error
