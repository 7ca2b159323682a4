"""What a fit takes, keeps between steps, and gives back. Immutable; no behaviour beyond conversion."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

Move = tuple[Tensor, ...]
"""A change of bank and codes: (bank,) or (left, right), then (codes,) if the codes move too."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Resolved sizes of one bank."""

    n: int
    """experts that share the bank"""
    p: int
    """rows of an expert"""
    d: int
    """columns of an expert"""
    m: int
    """atoms"""
    r: int
    """rows of an atom"""
    target_support: int | None = None
    """median number of atoms an expert may use at the end; None is dense"""
    atom_rank: int | None = None
    """k of low-rank atoms B_j = U_j V_j; None is dense atoms"""

    @property
    def parameters(self) -> int:
        """Kept numbers: adapters n p r, codes n m, and the bank: m r d, or m k (r + d) with low-rank atoms."""
        atom = self.r * self.d if self.atom_rank is None else self.atom_rank * (self.r + self.d)
        return self.n * self.p * self.r + self.m * atom + self.n * self.m

    @property
    def kept(self) -> float:
        """Kept share of the family's own n p d parameters; r/d + m r/(n p) + m/(p d) with dense atoms."""
        return self.parameters / (self.n * self.p * self.d)


class Factors(NamedTuple):
    """W_i ~ adapters_i phi_lam(sum_j codes_ij bank_j). With low-rank atoms bank_j = left_j right_j."""

    bank: Float[Tensor, "m r d"]
    codes: Float[Tensor, "n m"]
    adapters: Float[Tensor, "n p r"]
    left: Float[Tensor, "m r k"] | None = None
    right: Float[Tensor, "m k d"] | None = None


class StopReason(StrEnum):
    steps = "steps"
    time = "time"
    converged = "converged"
    stalled = "stalled"
    closed_form = "closed_form"
    diverged = "diverged"

    @property
    def sentence(self) -> str:
        return {
            StopReason.steps: "all steps were taken (train.steps)",
            StopReason.time: "the time limit was reached (train.time_limit)",
            StopReason.converged: "the validation error is on a plateau and the support is stable (train.patience)",
            StopReason.stalled: "no step lowers the objective any more",
            StopReason.closed_form: "the method takes no steps",
            StopReason.diverged: "the error was no longer finite; the best state before that was kept",
        }[self]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of `metrics.jsonl`. Times in seconds; objective is the sum of squared residuals, normalised."""

    step: int
    seconds: float
    objective: float
    relfrob: float
    validation_relfrob: float | None
    lam: float
    beta: float
    temperature: float
    accepted: bool
    damping: float
    regularised_solves: int
    support_median: float
    support_mean: float
    support_min: int
    support_max: int
    seconds_coding: float
    seconds_dictionary: float
    seconds_refit: float

    def flat(self) -> dict[str, float | int | bool | None]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FitState:
    """All that is needed to continue a fit bit for bit on the same machine: tensors, and plain numbers."""

    tensors: dict[str, Tensor]
    numbers: dict[str, float | int | bool | str | None]


@dataclass(frozen=True, slots=True)
class FitResult:
    factors: Factors
    lam: float
    """value of the homotopy at the end, part of the exported model"""
    stop: StopReason
    steps: int
    relfrob_start: float
    """after the warm start, before the first step"""
    relfrob: float
    """of `factors`, on the normalised experts, before pruning and export"""
    energy_captured: float
    """share of the experts' energy in their own rank-r truncated SVD, the ceiling of any fit with this r"""
    accepted: int
    rejected: int
    regularised_solves: int
    seconds: float
