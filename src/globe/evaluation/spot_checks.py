"""Single experts, drawn at random: what compression did to their spectra, and whether the model in memory really
multiplies by the matrix that its files stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from globe.bank.compose import mixed_bases, rebuild
from globe.calibration.experts_module import experts_modules
from globe.checkpoint import Checkpoint
from globe.checkpoint.architecture import FAMILIES
from globe.checkpoint.experts import SHARED
from globe.evaluation.sizes import compressed_places
from globe.evaluation.subject import Subject
from globe.hf.experts import GlobeExperts
from globe.hf.layout import Mean
from globe.hf.projection import Projection
from globe.hf.structure import irregularity
from globe.numerics.figures import effective_rank
from globe.numerics.precision import to_float64

PROBES = 7
"""Random inputs that parity is measured with."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest parity error that rounding explains; `HALF_TOLERANCE` for narrower dtypes."""
HALF_TOLERANCE = 3e-2


class Place(NamedTuple):
    layer: int
    family: str
    expert: int


@dataclass(frozen=True, slots=True)
class SpotCheck:
    """One expert W of the original beside W', what the model has in its place."""

    layer: int
    family: str
    expert: int
    relfrob: float
    """||W - W'||_F / ||W||_F"""
    spectrum: float
    """||s - s'|| / ||s|| of the singular values: no more than relfrob (Mirsky)"""
    effective_rank: tuple[int, int]
    """singular values that hold 95 % of the energy, of W and of W'"""
    alignment_left: float
    """mean squared cosine of the angles between the leading left singular subspaces: 1 if they are the same"""
    alignment_right: float
    parity: float | None
    """relative error of what the model's own module makes of random inputs, against the same from gate and up
    as the files say they are; None where the experts have a form of their own"""


class Pair(NamedTuple):
    """The model and the original, their files and their modules."""

    subject: Subject
    model: nn.Module
    checkpoint: Checkpoint
    """of the original"""
    dense: nn.Module
    """the original in memory"""


def draw_places(pair: Pair, count: int, *, seed: int) -> list[Place]:
    """Draw `count` different experts, or all if there are fewer, from those that are compressed.

    A model that does not say what is compressed has them drawn from gate and up of all its layers.
    """
    places = compressed_places(pair.subject)
    if not places:
        layout = pair.checkpoint.architecture.layouts[0]
        families = [one for one in ("gate", "up") if layout.slot(one) is not None]
        places = tuple((layer, family) for layer in pair.checkpoint.moe_layers for family in families)
    chosen = [Place(*place, expert) for place in places for expert in _compressed_experts(pair, place)]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(chosen[index] for index in order[:count])


def _compressed_experts(pair: Pair, place: tuple[int, str]) -> Sequence[int]:
    for entry in pair.subject.entries:
        for member in entry.members:
            if (member.layer, member.family) == place:
                return [expert for expert in member.experts if expert != SHARED]
    module = pair.model.get_submodule(experts_modules(pair.model)[place[0]])
    if isinstance(module, GlobeExperts) and (rows := module.projections[place[1]].row):
        return list(rows)
    return range(pair.checkpoint.shape(*place).n)


@torch.no_grad()
def spot_checks(pair: Pair, places: Sequence[Place], *, top_k: int, seed: int) -> tuple[SpotCheck, ...]:
    """Compare each expert with the original's, one at a time."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place in places:
        W = stored_matrix(pair.checkpoint, place)
        probes = torch.randn(PROBES, W.shape[1], generator=generator)
        rebuilt = rebuilt_matrix(pair, place)
        found.append(compare(place, W, rebuilt, top_k=top_k, parity=_parity(pair, place, probes)))
    return tuple(found)


def _parity(pair: Pair, place: Place, x: Float[Tensor, "t d"]) -> float | None:
    dense = pair.dense.get_submodule(experts_modules(pair.dense)[place.layer])
    if irregularity(dense) is not None:
        return None
    module = pair.model.get_submodule(experts_modules(pair.model)[place.layer])
    matrices = {family: rebuilt_matrix(pair, place._replace(family=family)) for family in FAMILIES}
    return parity_error(module, dense, place.expert, matrices, x)


def compare(
    place: Place, W: Float[Tensor, "p d"], rebuilt: Float[Tensor, "p d"], *, top_k: int, parity: float | None
) -> SpotCheck:
    """Return distances and angles between two matrices, in float64. `top_k` is at most min(p, d)."""
    k = min(top_k, *W.shape)
    left, values, right = torch.linalg.svd(to_float64(W), full_matrices=False)
    left2, values2, right2 = torch.linalg.svd(to_float64(rebuilt), full_matrices=False)
    ranks = effective_rank(torch.stack([values, values2])).tolist()
    return SpotCheck(
        *place,
        relfrob=_distance(W, rebuilt),
        spectrum=_distance(values, values2),
        effective_rank=(ranks[0], ranks[1]),
        alignment_left=float((left[:, :k].mT @ left2[:, :k]).square().sum() / k),
        alignment_right=float((right[:k] @ right2[:k].mT).square().sum() / k),
        parity=parity,
    )


def stored_matrix(checkpoint: Checkpoint, place: Place) -> Float[Tensor, "p d"]:
    """Read one matrix of a dense checkpoint in float64; only its own bytes are read."""
    where = checkpoint.locate(*place)
    part = checkpoint.reader.read(where.tensor, where.index)
    return to_float64(part.T if where.transposed else part)


def rebuilt_matrix(pair: Pair, place: Place) -> Float[Tensor, "p d"]:
    """Return what the files say the expert is now: a dense tensor, a row of a run's bank, or the product of factors."""
    for entry in pair.subject.entries:
        for member in entry.members:
            if (member.layer, member.family) == place[:2] and place.expert in member.experts:
                row = member.start + member.experts.index(place.expert)
                return to_float64(rebuild(entry.read(), [row], dtype=torch.float32)[0])
    if pair.subject.checkpoint is not None:
        return stored_matrix(pair.subject.checkpoint, place)
    module = pair.model.get_submodule(experts_modules(pair.model)[place.layer])
    if not isinstance(module, GlobeExperts):  # a layer of a compact checkpoint that no bank serves
        return stored_matrix(pair.checkpoint, place)
    if place.family not in module.projections:  # down, which no bank serves
        return to_float64(module.down_proj[place.expert].mT).cpu()
    return product_of_factors(module.projections[place.family], place.expert)


def product_of_factors(projection: Projection, expert: int) -> Float[Tensor, "p d"]:
    """Return W' = A phi(sum_j alpha_j B_j) + mean of one expert in float64, from the factors as they are stored."""
    if expert in projection.dense_row:
        return to_float64(projection.dense[projection.dense_row[expert]]).cpu()
    layout, bank, row = projection.layout, projection.bank_here(), projection.row[expert]
    assert layout is not None
    assert bank is not None
    atoms, left, right = (None if part is None else to_float64(part) for part in bank)
    M = mixed_bases(
        to_float64(projection.codes[row : row + 1]),
        atoms,
        atoms_left=left,
        atoms_right=right,
        lam=layout.lam,
        activation=layout.activation,
    )[0]
    W = to_float64(projection.adapters[row]) @ M
    return (W if layout.mean is Mean.none else W + to_float64(projection.mean)).cpu()


def parity_error(
    module: nn.Module,
    dense: nn.Module,
    expert: int,
    matrices: Mapping[str, Float[Tensor, "p d"]],
    x: Float[Tensor, "t d"],
) -> float:
    """Return ||y - z||_F / ||z||_F, y being what a module makes of x for one expert, z the same from matrices.

    z = down^T (act(gate x) * up x) in float64, with the gating of `dense`, the original's module; `matrices` are
    those of the expert by family.
    """
    x = x.to(next(module.parameters()))
    chosen = torch.full((x.shape[0], 1), expert, device=x.device)
    y = module(x, chosen, torch.ones_like(chosen, dtype=x.dtype))
    wide = to_float64(x)
    gated: Any = dense._apply_gate
    inner = gated(
        torch.cat([wide @ one.to(wide.device).mT for one in (matrices["gate"], matrices["up"])], dim=1)
    )
    return _distance(inner @ matrices["down"].to(wide.device), y)


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest error of parity that rounding explains in a model computed in `dtype`."""
    return TOLERANCE.get(dtype, HALF_TOLERANCE)


def _distance(one: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> float:
    """Return ||one - other|| / ||one||; 0 for two zeros."""
    first, second = to_float64(one).cpu(), to_float64(other).cpu()
    error, norm = float((first - second).norm()), float(first.norm())
    return error / norm if norm else 0.0 if error == 0 else math.inf
