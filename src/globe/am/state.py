"""What a fit carries from step to step."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from globe.am.objective import Point, adapters_at, evaluate
from globe.am.records import Move, StepOptions
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.metric import Metric


class Constraint(NamedTuple):
    """What codes may be, beyond non-negative and not all zero for an expert."""

    support: Bool[Tensor, "n m"] | None = None
    """codes that may differ from zero; None is all"""
    simplex: bool = False
    """codes of an expert sum to one"""

    def feasible(self, codes: Float[Tensor, "n m"], before: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Return `codes` clamped and masked; an expert left with none keeps those it had `before`."""
        codes = codes.clamp_min(0)
        if self.support is not None:
            codes = codes * self.support
        total = codes.sum(dim=1, keepdim=True)
        codes = torch.where(total > 0, codes, before)
        return codes / codes.sum(dim=1, keepdim=True) if self.simplex else codes


class Atoms(NamedTuple):
    """All of a state but the adapters: the bank (with its low-rank factors, if it has them) and the codes."""

    bank: Float[Tensor, "m r d"]
    codes: Float[Tensor, "n m"]
    left: Float[Tensor, "m r k"] | None = None
    right: Float[Tensor, "m k d"] | None = None

    def with_codes(self, codes: Float[Tensor, "n m"]) -> Atoms:
        return self._replace(codes=codes)

    def moved(self, step: Move, constraint: Constraint, *, joint: bool) -> Atoms:
        """Return the atoms after a step of the bank, or left and right, and of the codes if they move."""
        codes = self.codes
        if joint:
            codes = constraint.feasible(codes + step[-1], codes)
        if self.left is None or self.right is None:
            return Atoms(self.bank + step[0], codes)
        return low_rank_atoms(self.left + step[0], self.right + step[1], codes)

    def beyond(self, origin: Atoms, weight: float, constraint: Constraint) -> Atoms:
        """Return the extrapolation self + weight (self - origin)."""
        codes = constraint.feasible(torch.lerp(origin.codes, self.codes, 1 + weight), self.codes)
        if self.left is None or self.right is None:
            return Atoms(torch.lerp(origin.bank, self.bank, 1 + weight), codes)
        assert origin.left is not None
        assert origin.right is not None
        left = torch.lerp(origin.left, self.left, 1 + weight)
        return low_rank_atoms(left, torch.lerp(origin.right, self.right, 1 + weight), codes)


def low_rank_atoms(
    left: Float[Tensor, "m r k"], right: Float[Tensor, "m k d"], codes: Float[Tensor, "n m"]
) -> Atoms:
    """Return atoms B_j = U_j V_j, with the dense product kept beside its factors.

    Contiguous, as they are after a restart: another layout rounds products differently.
    """
    left, right = left.contiguous(), right.contiguous()
    return Atoms(left @ right, codes, left, right)


class AMState(NamedTuple):
    """A fit between two steps."""

    atoms: Atoms
    point: Point
    """adapters and first-order picture at `atoms`"""
    anchor: Atoms
    """where the last Gauss-Newton step ended before it was extrapolated"""
    momentum_steps: int
    """steps since the extrapolation was last reset"""
    damping: float
    lam: float
    constraint: Constraint
    fine: bool = False
    """whether low-precision curvature products are over: the steps have become too small for them"""

    @property
    def objective(self) -> float:
        return self.point.objective


def start_state(
    X: Float[Tensor, "n p d"],
    atoms: Atoms,
    options: StepOptions,
    *,
    damping: float = 1e-3,
    constraint: Constraint = Constraint(),  # noqa: B008  (immutable)
    metric: Metric | None = None,
    into: Point | None = None,
    group: ProcessGroup = ALONE,
) -> AMState:
    """Return a state at rest with the adapters refit to `atoms`; `metric` and `into` as in `evaluate`."""
    point = evaluate(X, atoms.bank, atoms.codes, options, metric=metric, into=into, group=group)
    return AMState(atoms, point, atoms, 0, damping, options.lam, constraint)


def adapters_of(X: Float[Tensor, "n p d"], state: AMState, options: StepOptions) -> Float[Tensor, "n p r"]:
    """Return the adapters of the state's point, made anew where the point goes without."""
    if state.point.adapters is not None:
        return state.point.adapters
    options = replace(options, lam=state.lam)
    return adapters_at(X, state.atoms.bank, state.atoms.codes, options, metric=state.point.metric)
