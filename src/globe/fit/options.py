"""What a configuration says of the fit of one bank, as `globe.am` takes it."""

from __future__ import annotations

import torch

from globe.am.options import Curve, FitOptions, Start
from globe.am.records import StepOptions
from globe.bank.precision import Precision
from globe.config.fit_options import CurveConfig
from globe.config.schema import Config


def fit_options(
    config: Config, *, export_dtype: torch.dtype | None = None, precision: Precision | None = None
) -> FitOptions:
    """Return the options of a fit; they leave the configuration nowhere else.

    A fit whose factors are rounded to a `precision` takes at least the ridge that the rounding wants.
    """
    least_ridge = 0.0 if precision is None else precision.ridge
    train, codes, init, schedule = config.train, config.codes, config.init, config.schedule
    step = StepOptions(
        activation=str(config.bank.activation),
        dictionary=str(train.dictionary),
        code_map=str(codes.map),
        l1=codes.l1,
        joint=codes.joint,
        cg_iterations=train.cg_iterations,
        cg_tolerance=train.cg_tolerance,
        momentum=train.momentum,
        lambda_A=max(train.lambda_A, least_ridge),
        lambda_B=train.lambda_B,
        lambda_T=train.lambda_T,
    )
    return FitOptions(
        step,
        Start(str(init.seeding), str(init.codes), init.one_hot, init.concentration, init.scale),
        _curve(schedule.lam),
        _curve(schedule.beta),
        _curve(schedule.temperature),
        curvature=str(train.curvature_dtype),
        least_ridge=least_ridge,
        damping=train.damping,
        simplex=codes.simplex,
        coding_every=codes.every,
        control_every=codes.control_every,
        eta=codes.eta,
        prune=codes.prune,
        export_dtype=export_dtype,
        steps=train.steps,
        time_limit=train.time_limit,
        evaluate_every=train.evaluate_every,
        patience=train.patience,
        tolerance=train.tolerance,
        checkpoint_every=train.checkpoint_every,
    )


def _curve(curve: CurveConfig) -> Curve:
    return Curve(str(curve.kind), curve.start, curve.end, curve.warmup, curve.hold)
