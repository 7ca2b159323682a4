"""All figures of a finished bank, gathered by name from the pure functions of `globe.numerics.figures`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import FitResult, StepRecord
from globe.bank.compose import rebuild
from globe.bank.record import BankArtefact
from globe.fit.finalise import Finalised
from globe.fit.normalise import Joined
from globe.numerics import figures as error_figures
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.precision import to_float64
from globe.runs.chart_data import MOST_ATOMS, MOST_CODES, MOST_RANKS, BankCharts, largest, spread_out

_SPECTRUM_BUDGET = 2e10
"""Multiply-adds for the spectra behind the effective rank; experts beyond it are left out, evenly."""
_FEWEST_SPECTRA = 4
_DRAWN_SPECTRA = 16
"""Experts, of those at most, whose rebuilt spectra are taken as well."""


class Spectra(NamedTuple):
    """Singular values of some of the experts."""

    rows: tuple[int, ...]
    values: Float[Tensor, "k q"]
    """largest first"""


def expert_spread(X: Float[Tensor, "n p d"], group: ProcessGroup = ALONE) -> error_figures.Spread:
    """Return `numerics.figures.spread` of the experts of all processes."""
    own = error_figures.spread(X)
    return error_figures.Spread(group.gather(own.sums), group.gather(own.squares), own.entries)


def expert_spectra(X: Float[Tensor, "n p d"], group: ProcessGroup = ALONE) -> Spectra:
    """Return the singular values of all processes' normalised experts, or of evenly spaced ones within the budget."""
    n, p, d = group.count(X.shape[0]), *X.shape[1:]
    count = max(int(_SPECTRUM_BUDGET / min(p, d) ** 2 / max(p, d)), _FEWEST_SPECTRA)
    rows = spread_out(n, count)
    first = group.rows.start or 0
    values = to_float64(X.new_zeros(len(rows), min(p, d)))
    for at, row in enumerate(rows):  # one by one: a copy of so many experts would be large
        if 0 <= row - first < len(X):
            values[at] = error_figures.singular_values(X[row - first, None])[0]
    return Spectra(tuple(rows), group.sum(values))


def bank_figures(
    spread: error_figures.Spread,
    spectra: Spectra,
    result: FitResult,
    done: Finalised,
    last: StepRecord | None,
) -> dict[str, float | None]:
    """Return figures of reconstruction, sparsity and stability of one bank; None stands for one that is not finite.

    `spread` is that of the normalised experts, `last` the record of the last step (None: a fit without steps).
    Reconstruction is that of the exported factors.
    """
    figures = _reconstruction(spread, spectra, result, done) | _sparsity(done) | _stability(result, done)
    if done.relfrob_metric is not None:
        figures["relfrob_metric"] = done.relfrob_metric
    if last is not None:
        figures |= {
            "temperature": last.temperature,
            "damping": last.damping,
            "lam": last.lam,
            "beta": last.beta,
        }
    return {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}


def expert_relfrob(done: Finalised) -> tuple[float, ...]:
    """Return RelFrob of each expert; 0 for a zero expert that is reproduced."""
    pairs = zip(done.errors, done.norms, strict=True)
    return tuple(error_figures.relfrob(error[None], norm[None]) for error, norm in pairs)


def jaccard_by_layer(codes: Mapping[tuple[int, str], Float[Tensor, "n m"]]) -> dict[int, float]:
    """Return the Jaccard index of the up and gate supports of every layer that has both, by layer.

    The keys are (layer, family). Layers whose two banks differ in shape are left out.
    """
    return {
        layer: error_figures.jaccard(up, codes[layer, "gate"])
        for (layer, family), up in codes.items()
        if family == "up" and (layer, "gate") in codes and codes[layer, "gate"].shape == up.shape
    }


def jaccard_figures(codes: Mapping[tuple[int, str], Float[Tensor, "n m"]]) -> dict[str, float | None]:
    """Return the mean over the layers (None for no layer), and the index of each."""
    values = jaccard_by_layer(codes)
    mean = sum(values.values()) / len(values) if values else None
    return {"support_jaccard": mean} | {f"support_jaccard_layer{at:03d}": one for at, one in values.items()}


def bank_charts(spectra: Spectra, joined: Joined, artefact: BankArtefact) -> BankCharts:
    """Return code shares and singular spectra of an exported bank, within the bounds of `globe.runs.chart_data`."""
    shares = error_figures.code_shares(artefact.codes)
    atoms = largest(shares.sum(dim=0).tolist(), MOST_ATOMS)
    experts = spread_out(artefact.n, max(1, MOST_CODES // len(atoms)))
    kept = spread_out(len(spectra.rows), _DRAWN_SPECTRA)
    rows = [spectra.rows[at] for at in kept]
    ranks = spread_out(spectra.values.shape[1], MOST_RANKS)
    rebuilt = torch.stack([_rebuilt_spectrum(joined, artefact, row) for row in rows])
    return BankCharts(
        code_experts=tuple(experts),
        code_atoms=tuple(atoms),
        code_shares=tuple(
            tuple(round(float(share), 3) for share in shares[expert, atoms]) for expert in experts
        ),
        spectrum_experts=tuple(rows),
        spectrum_ranks=tuple(rank + 1 for rank in ranks),
        spectrum_original=_rounded(spectra.values[kept][:, ranks].mean(dim=0)),
        spectrum_rebuilt=_rounded(rebuilt[:, ranks].mean(dim=0)),
    )


def _rebuilt_spectrum(joined: Joined, artefact: BankArtefact, row: int) -> Float[Tensor, " q"]:
    """Return the singular values of one rebuilt expert, in the units of the normalised ones."""
    expert = rebuild(artefact, [row], dtype=joined.experts.dtype)
    if joined.mean is not None:
        expert = expert - joined.mean[bisect_right(joined.starts, row) - 1]
    if joined.scale is not None:
        scale = joined.scale[row]
        expert = expert / (scale if scale.dim() == 0 else scale.unsqueeze(1))
    return error_figures.singular_values(expert)[0]


def _rounded(values: Float[Tensor, " q"]) -> tuple[float, ...]:
    return tuple(float(f"{float(value):.4g}") for value in values)


def _reconstruction(
    spread: error_figures.Spread, spectra: Spectra, result: FitResult, done: Finalised
) -> dict[str, float]:
    per_expert = error_figures.explained_variance_per_expert(done.errors, spread)
    ranks = error_figures.effective_rank(spectra.values).double()
    return {
        "mse": error_figures.mse(done.errors, spread.entries),
        "explained_variance": error_figures.explained_variance(done.errors, spread),
        "explained_variance_expert_min": float(per_expert.min()),
        "explained_variance_expert_mean": float(per_expert.mean()),
        "global_mean": error_figures.global_mean(spread),
        "energy_captured": result.energy_captured,
        "effective_rank_mean": float(ranks.mean()),
        "effective_rank_max": float(ranks.max()),
        "effective_rank_experts": len(spectra.rows),
    }


def _sparsity(done: Finalised) -> dict[str, float]:
    codes = done.factors.codes
    support, usage = error_figures.summarise_support(codes), error_figures.atom_usage(codes).double()
    return {
        "support_mean": support.mean,
        "support_median": support.median,
        "support_min": support.min,
        "support_max": support.max,
        "code_entropy": float(error_figures.entropy(codes).mean()),
        "effective_support": float(error_figures.effective_support(codes).mean()),
        "zero_share": error_figures.zero_share(codes),
        "pruned_share": done.pruned,
        "code_l1": float(codes.double().sum(dim=1).mean()),
        "atom_usage_min": float(usage.min()),
        "atom_usage_mean": float(usage.mean()),
        "atom_usage_max": float(usage.max()),
    }


def _stability(result: FitResult, done: Finalised) -> dict[str, float]:
    norms, coherence = error_figures.atom_norms(done.factors.bank), error_figures.coherence(done.factors.bank)
    return {
        "atom_norm_min": float(norms.min()),
        "atom_norm_mean": float(norms.mean()),
        "atom_norm_max": float(norms.max()),
        "coherence_mean": coherence.mean,
        "coherence_max": coherence.max,
        "code_condition": error_figures.condition_number(done.factors.codes),
        "accepted": result.accepted,
        "rejected": result.rejected,
        "regularised_solves": result.regularised_solves,
    }
