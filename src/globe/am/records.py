"""What a fit takes, keeps between steps, and gives back. Immutable; no behaviour beyond conversion."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
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


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The scalars of one step of alternating minimisation."""

    activation: str
    """identity, silu, tanh or gelu"""
    lam: float = 1.0
    """value of the homotopy phi_lam from linear (0) to the activation (1)"""
    beta: float = 1.0
    """share of the weight-aware target in the dictionary step; the rest is the aligned warm start"""
    temperature: float = 1.0
    """temperature of entmax in a sparse coding step"""
    dictionary: str = "gauss_newton"
    """gauss_newton: the projected step, taken only if the objective falls (with beta < 1: the blended objective);
    mod: plain least squares on the targets, always taken"""
    coding: bool = False
    """whether a coding step comes before the dictionary step"""
    sparse: bool = False
    """whether the coding step takes its support from entmax at `temperature`"""
    code_map: str = "entmax15"
    l1: float = 0.0
    """price on codes, relative to the mean diagonal of their normal equations"""
    joint: bool = True
    """whether the codes move with the bank in the Gauss-Newton step"""
    cg_iterations: int = 10
    cg_tolerance: float = 0.0
    """when the conjugate gradients end before `cg_iterations`; see `gauss_newton_direction`"""
    momentum: float = 0.9
    """largest weight of the extrapolation"""
    lambda_A: float = 0.0
    """relative ridge on the adapters"""
    lambda_B: float = 0.0
    """relative ridge on the bank"""
    lambda_T: float = 0.0
    """relative ridge on the targets of MOD"""
    curvature_dtype: torch.dtype | None = None
    """dtype of the products inside the conjugate gradients; None is that of the experts"""


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
    """One line of `metrics.jsonl`. Times are in seconds; the objective is the sum of squared residuals of the
    normalised experts, and the price of the ridge."""

    step: int
    seconds: float
    objective: float
    relfrob: float
    support_median: float
    support_mean: float
    support_min: int
    support_max: int
    validation_relfrob: float | None = None
    lam: float = 1.0
    beta: float = 1.0
    temperature: float = 1.0
    accepted: bool = True
    damping: float = 0.0
    regularised_solves: int = 0
    seconds_coding: float = 0.0
    seconds_dictionary: float = 0.0
    seconds_refit: float = 0.0

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
    seconds: float
    energy_captured: float = 1.0
    """share of the experts' energy in their own rank-r truncated SVD, the ceiling of any fit with this r"""
    accepted: int = 0
    rejected: int = 0
    regularised_solves: int = 0
    lambda_A: float = 0.0
    """ridge of the adapters' refit, which an export repeats"""
