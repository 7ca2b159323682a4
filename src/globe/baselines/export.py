"""A baseline's result as the artefact every other part of GloBE reads, measured as it is exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from globe.bank.compose import CHUNK, rebuild
from globe.bank.record import BankArtefact, Member
from globe.baselines.records import BaselineResult
from globe.errors import ConfigError
from globe.fit.normalise import Normalised, denormalise, fold_scale
from globe.numerics.figures import relfrob, squared_norms


def to_artefact(
    result: BaselineResult,
    normalised: Normalised,
    member: Member,
    *,
    export_dtype: torch.dtype,
    source: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    seed: int = 0,
) -> BankArtefact:
    """The factors with the normalisation folded back, in `export_dtype`: W_i ~ A_i M_i + mean.

    `normalised` are the experts that `result` approximates, of one member. The scale folds into the adapters.
    A mean expert of the method joins the mean of the normalisation, mean + scale * mean expert, which needs
    one scale for all experts (ConfigError otherwise). `metrics` holds the error before (`relfrob_fit`) and
    after (`relfrob`) rounding and the exactly counted parameters, which are fewer than the artefact's own
    count where a method's codes or gauge say nothing.
    """
    mean, scale = _mean(result, normalised), normalised.scale

    def rounded(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(export_dtype)

    artefact = BankArtefact(
        members=(member,),
        codes=result.codes.to(export_dtype),
        adapters=fold_scale(result.adapters, scale).to(export_dtype),
        activation=result.activation,
        lam=result.lam,
        bank=rounded(result.bank),
        atoms_left=rounded(result.atoms_left),
        atoms_right=rounded(result.atoms_right),
        mean=mean if mean is None or mean.dim() == 1 else mean.to(export_dtype),
        scale=scale.reshape(1) if scale is not None and scale.dim() == 0 else scale,
        source=source,
        config=config,
        seed=seed,
        metrics={
            "method": result.label,
            "relfrob_fit": result.relfrob,
            "parameters": result.sizes.parameters,
            "kept": result.kept,
            "steps": result.steps,
            "seconds": result.seconds,
            "stop": str(result.stop),
        },
    )
    assert artefact.metrics is not None
    artefact.metrics["relfrob"] = exported_error(artefact, normalised)
    return artefact


def _mean(result: BaselineResult, normalised: Normalised) -> Tensor | None:
    """(1,) for a number, (1, p, d) for a matrix."""
    mean, scale = normalised.mean, normalised.scale
    if result.mean is None:
        return None if mean is None else mean[None]
    if scale is not None and scale.dim() > 0:
        raise ConfigError("mean_svd stores one mean for all experts: use normalise.scale=family or none")
    own = result.mean if scale is None else scale * result.mean
    return (own if mean is None else own + mean)[None]


def exported_error(artefact: BankArtefact, normalised: Normalised) -> float:
    """RelFrob of what a reader of the artefact rebuilds, in the units of the normalised experts."""
    X, scale = normalised.experts, normalised.scale
    errors = []
    for start in range(0, X.shape[0], CHUNK):
        rows = slice(start, min(start + CHUNK, X.shape[0]))
        part = scale[rows] if scale is not None and scale.dim() > 0 else scale
        W = denormalise(X[rows], normalised.mean, part)
        residual = rebuild(artefact, range(rows.start, rows.stop), dtype=X.dtype) - W
        errors.append(squared_norms(fold_scale(residual, None if part is None else 1 / part)))
    return relfrob(torch.cat(errors), squared_norms(X))
