"""All figures of a finished bank, gathered by name from the pure functions of `globe.metrics`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from globe import metrics
from globe.am.records import FitResult, StepRecord
from globe.finalise import Finalised

_SPECTRUM_BUDGET = 2e10
"""Multiply-adds for the spectra behind the effective rank; experts beyond it are left out, evenly."""
_FEWEST_SPECTRA = 4


def bank_figures(
    X: Float[Tensor, "n p d"], result: FitResult, done: Finalised, last: StepRecord | None
) -> dict[str, float | None]:
    """Reconstruction, sparsity and stability of one bank; None stands for a figure that is not finite.

    `X` are the normalised experts, `last` the record of the last step (None: a fit without steps).
    Reconstruction is that of the exported factors.
    """
    figures = _reconstruction(X, result, done) | _sparsity(done) | _stability(result, done)
    if last is not None:
        figures |= {
            "temperature": last.temperature,
            "damping": last.damping,
            "lam": last.lam,
            "beta": last.beta,
        }
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}


def expert_relfrob(done: Finalised) -> tuple[float, ...]:
    """RelFrob of each expert; 0 for a zero expert that is reproduced."""
    pairs = zip(done.errors, done.norms, strict=True)
    return tuple(metrics.relfrob(error[None], norm[None]) for error, norm in pairs)


def mean_jaccard(codes: Mapping[tuple[int, str], Float[Tensor, "n m"]]) -> float | None:
    """Jaccard index of the up and gate supports, mean over the layers that have both; None for no layer.

    The keys are (layer, family). Layers whose two banks differ in shape are left out.
    """
    values = [
        metrics.jaccard(up, codes[layer, "gate"])
        for (layer, family), up in codes.items()
        if family == "up" and (layer, "gate") in codes and codes[layer, "gate"].shape == up.shape
    ]
    return sum(values) / len(values) if values else None


def _reconstruction(X: Float[Tensor, "n p d"], result: FitResult, done: Finalised) -> dict[str, float]:
    n, p, d = X.shape
    spread = metrics.spread(X)
    per_expert = metrics.explained_variance_per_expert(done.errors, spread)
    chosen = _spread_out(n, int(_SPECTRUM_BUDGET / min(p, d) ** 2 / max(p, d)))
    ranks = metrics.effective_rank(metrics.singular_values(X[chosen])).double()
    return {
        "mse": metrics.mse(done.errors, p * d),
        "explained_variance": metrics.explained_variance(done.errors, spread),
        "explained_variance_expert_min": float(per_expert.min()),
        "explained_variance_expert_mean": float(per_expert.mean()),
        "global_mean": metrics.global_mean(spread),
        "energy_captured": result.energy_captured,
        "effective_rank_mean": float(ranks.mean()),
        "effective_rank_max": float(ranks.max()),
        "effective_rank_experts": len(chosen),
    }


def _sparsity(done: Finalised) -> dict[str, float]:
    codes = done.factors.codes
    support, usage = metrics.summarise_support(codes), metrics.atom_usage(codes).double()
    return {
        "support_mean": support.mean,
        "support_median": support.median,
        "support_min": support.min,
        "support_max": support.max,
        "code_entropy": float(metrics.entropy(codes).mean()),
        "effective_support": float(metrics.effective_support(codes).mean()),
        "zero_share": metrics.zero_share(codes),
        "pruned_share": done.pruned,
        "code_l1": float(codes.double().sum(dim=1).mean()),
        "atom_usage_min": float(usage.min()),
        "atom_usage_mean": float(usage.mean()),
        "atom_usage_max": float(usage.max()),
    }


def _stability(result: FitResult, done: Finalised) -> dict[str, float]:
    norms, coherence = metrics.atom_norms(done.factors.bank), metrics.coherence(done.factors.bank)
    return {
        "atom_norm_min": float(norms.min()),
        "atom_norm_mean": float(norms.mean()),
        "atom_norm_max": float(norms.max()),
        "coherence_mean": coherence.mean,
        "coherence_max": coherence.max,
        "code_condition": metrics.condition_number(done.factors.codes),
        "accepted": result.accepted,
        "rejected": result.rejected,
        "regularised_solves": result.regularised_solves,
    }


def _spread_out(n: int, count: int) -> list[int]:
    """`count` of n positions, the first and the last among them; at least a few, at most all."""
    count = min(n, max(count, _FEWEST_SPECTRA))
    return [position * (n - 1) // max(count - 1, 1) for position in range(count)]
