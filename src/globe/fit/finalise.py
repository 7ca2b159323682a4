"""The last step of a fit: freeze the supports, refit once, fold the scale back, round to the export dtype."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors
from globe.am.temperature import prune as prune_codes
from globe.bank.compose import factor_bases
from globe.bank.packed_tensors import Stored
from globe.bank.precision import Precision
from globe.errors import FitError
from globe.fit.normalise import Joined, Normalised, fold_scale, join
from globe.fit.rounding import round_factors
from globe.numerics.figures import CHUNK, pruned_share, relfrob, squared_norms
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.input_metric import InputMetric

Refit = Callable[[Float[Tensor, "n p d"], Float[Tensor, "n r d"]], Float[Tensor, "n p r"]]
"""Least squares adapters: (X, M) -> argmin over A_i of ||X_i - A_i M_i||."""


class Finalised(NamedTuple):
    """Factors as they are exported, and what they cost in accuracy."""

    factors: Factors
    """pruned, in the exported dtype, the scale folded into the adapters: W_i ~ adapters_i M_i + mean"""
    mean: Tensor | None
    """nothing, one number per member (members,) in the fit's dtype, or (members, p, d) in the exported one"""
    scale: Tensor | None
    """the folded scale, (n,) or (n, p); provenance"""
    errors: Float[Tensor, " n"]
    """squared Frobenius errors of the exported factors, in the units of the normalised experts"""
    norms: Float[Tensor, " n"]
    """squared Frobenius norms of the normalised experts"""
    relfrob: float
    """sqrt(sum errors / sum norms): the headline figure"""
    pruned: float = 0.0
    """share of the positive codes that the prune set to zero"""
    relfrob_metric: float | None = None
    """the same figure with errors and norms in the metric, where there is one"""
    packed: Mapping[str, Stored] = MappingProxyType({})
    """the factors that are stored with few bits; `factors` are what they are read back as"""


def finalise(
    factors: Factors,
    normalised: Normalised | Joined,
    *,
    lam: float,
    activation: str,
    export_dtype: torch.dtype,
    prune: float,
    refit: Refit | None = None,
    metric: InputMetric | None = None,
    precision: Precision | None = None,
    group: ProcessGroup = ALONE,
) -> Finalised:
    """Prune, round bank and codes, refit the adapters to the rounded bases, fold the scale, round, measure.

    With low-rank atoms their two halves are what is exported; `factors.bank` is then their product again.

    `refit` is the fit's own least-squares step; it sees the bases of the pruned codes and of the bank as rounded, so
    that the adapters make good what the rounding spoilt. None leaves the adapters as they are. With a metric the refit
    is that of D_i X_i L_i to M_i L_i, whatever the activation. With a `precision` the factors are rounded to few bits
    instead, which refits the adapters with a ridge of its own (`round_factors`); experts and factors have to be those
    of one process then.

    With several processes, factors and experts are this one's and the result is that of all, but for the adapters,
    which are all on process 0 alone.

    Raises FitError when `export_dtype` can't hold the factors: overflow, or an expert whose codes all vanish.
    """
    joined = normalised if isinstance(normalised, Joined) else join([normalised])
    kept = factors._replace(codes=prune_codes(factors.codes, prune))
    form: Form = {"lam": lam, "activation": activation, "export_dtype": export_dtype, "metric": metric}
    packed: Mapping[str, Stored] = {}
    if precision is None:
        exported = _refitted(kept, joined, refit, **form)
    else:
        exported, packed, *_ = round_factors(joined.experts, kept, precision, scale=joined.scale, **form)
    lost = (kept.codes > 0).any(dim=1) & (exported.codes == 0).all(dim=1)
    done = measured(exported, joined, packed=packed, lost=int(lost.sum()), group=group, **form)
    return done._replace(pruned=pruned_share(group.gather(factors.codes), done.factors.codes))


class Form(TypedDict):
    """What is exported, and how errors count."""

    lam: float
    activation: str
    export_dtype: torch.dtype
    metric: InputMetric | None


def measured(
    exported: Factors,
    joined: Joined,
    *,
    lam: float,
    activation: str,
    export_dtype: torch.dtype,
    metric: InputMetric | None,
    packed: Mapping[str, Stored],
    lost: int = 0,
    group: ProcessGroup = ALONE,
) -> Finalised:
    """Return exported factors with what they cost in accuracy; `group` as in `finalise`.

    Errors are residuals of the exported numbers, ||X_i - (scale_i^-1 A_i) M_i||^2 on the normalised experts, with A, M
    and the mean's rounding as a reader will get them, chunk by chunk. Raises FitError when factors are not finite, or
    experts have `lost` all their codes.
    """
    mean = joined.mean
    if mean is not None and mean.dim() == 3:
        mean = mean.to(export_dtype)
    _check({**exported._asdict(), "mean": mean}, lost, export_dtype)
    errors, seen = _errors(exported, joined, mean, lam, activation, metric)
    errors, norms = group.gather(errors), group.gather(squared_norms(joined.experts))
    return Finalised(
        exported._replace(codes=group.gather(exported.codes), adapters=group.collect(exported.adapters)),
        mean,
        None if joined.scale is None else group.gather(joined.scale),
        errors,
        norms,
        relfrob(errors, norms),
        relfrob_metric=None
        if metric is None
        else relfrob(group.gather(seen), group.gather(metric.norms(joined.experts))),
        packed=packed,
    )


def _refitted(
    factors: Factors,
    joined: Joined,
    refit: Refit | None,
    *,
    lam: float,
    activation: str,
    export_dtype: torch.dtype,
    metric: InputMetric | None,
) -> Factors:
    """Return the factors in the exported dtype, the adapters refitted to the rounded bases with the scale folded in."""
    X = joined.experts
    exported = _round_atoms(factors, export_dtype)
    adapters = X.new_empty(factors.adapters.shape, dtype=export_dtype)
    for rows in _chunks(X):
        own = factors.adapters[rows]
        if refit is not None:
            M = factor_bases(exported, rows, lam=lam, activation=activation).to(X)
            if metric is None:
                own = refit(X[rows], M)
            else:
                own = metric.adapters(refit(metric.seen(X[rows], rows), metric.bases(M, rows)), rows)
        adapters[rows] = fold_scale(own, None if joined.scale is None else joined.scale[rows])
    return exported._replace(adapters=adapters)


def _round_atoms(factors: Factors, dtype: torch.dtype) -> Factors:
    """Return the same factors with codes and atoms in another dtype."""
    codes = factors.codes.to(dtype)
    if factors.left is None or factors.right is None:
        return factors._replace(codes=codes, bank=factors.bank.to(dtype))
    left, right = factors.left.to(dtype), factors.right.to(dtype)
    bank = (left.to(factors.left.dtype) @ right.to(factors.right.dtype)).to(dtype)
    return factors._replace(codes=codes, bank=bank, left=left, right=right)


def _check(tensors: Mapping[str, Tensor | None], lost: int, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    remedy = "choose export_dtype=bfloat16 or float32" if dtype != torch.float32 else "restart the fit"
    for which, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise FitError(
                f"the {which} can't be written in export_dtype={name} (not finite there): {remedy}"
            )
    if lost:
        raise FitError(f"codes of {lost} experts vanish in export_dtype={name}: {remedy}")


def _errors(
    exported: Factors,
    joined: Joined,
    mean: Tensor | None,
    lam: float,
    activation: str,
    metric: InputMetric | None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the squared errors of the experts, plain and in the metric."""
    X, scale = joined.experts, joined.scale
    parts, seen = [], []
    for rows in _chunks(X):
        M = factor_bases(exported, rows, lam=lam, activation=activation).to(X)
        inverse = None if scale is None else 1 / scale[rows]
        approximation = fold_scale(exported.adapters[rows].to(X), inverse) @ M
        if mean is not None and joined.mean is not None and mean.dim() == 3:
            members = [bisect_right(joined.starts, row) - 1 for row in range(rows.start, rows.stop)]
            shift = (mean.to(X) - joined.mean)[members]
            approximation += fold_scale(shift, inverse)
        left = X[rows] - approximation
        parts.append(squared_norms(left))
        seen.append(parts[-1] if metric is None else metric.norms(left, rows.start))
    return torch.cat(parts), torch.cat(seen)


def _chunks(X: Float[Tensor, "n p d"]) -> Iterator[slice]:
    for start in range(0, X.shape[0], CHUNK):
        yield slice(start, min(start + CHUNK, X.shape[0]))
