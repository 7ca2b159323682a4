"""The sizes of a baseline, counted as it stores them, and what it gives back. Immutable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors, StopReason
from globe.config.choices import Method


@dataclass(frozen=True, slots=True)
class BaselineSizes:
    """Sizes of one baseline; `atom_rank` is the k of U_j (r, k) and V_j (k, d)."""

    method: Method
    n: int
    p: int
    d: int
    m: int
    r: int
    atom_rank: int | None = None

    @property
    def parameters(self) -> int:
        """Kept numbers, exactly, each method in its own tightest form.

        svd            n r (p + d)                           (identity codes say nothing and cost nothing)
        shared_basis   n p r + r d                           (nor do codes that are all one)
        mean_svd       p d + n r (p + d)                     (the mean expert is stored once)
        group_svd, mobe, mobe_corrected   n p r + m r d + n m
        rtn, gptq, gptq_rotated   n p d                      (every weight, with fewer bits)
        slbf           n p r + m k (r + d - k) + n m         (gauge fixed: k x k of every atom is an identity)
        """
        n, p, d, m, r = self.n, self.p, self.d, self.m, self.r
        match self.method:
            case Method.svd:
                return n * r * (p + d)
            case Method.shared_basis:
                return n * p * r + r * d
            case Method.mean_svd:
                return p * d + n * r * (p + d)
            case Method.rtn | Method.gptq | Method.gptq_rotated:
                return n * p * d
            case Method.slbf:
                assert self.atom_rank is not None
                return n * p * r + m * self.atom_rank * (r + d - self.atom_rank) + n * m
            case _:
                return n * p * r + m * r * d + n * m

    @property
    def kept(self) -> float:
        """Kept share of the family's own n p d parameters."""
        return self.parameters / (self.n * self.p * self.d)


class BaselinePoint(NamedTuple):
    """A measured state on the way. A closed form has one point."""

    step: int
    seconds: float
    """since the start of the method, its initialisation included"""
    relfrob: float
    """of the state after `step` steps, on the normalised experts"""


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """X_i ~ adapters_i phi_lam(sum_j codes_ij bank_j) (+ mean), with the `factors` of a GloBE bank."""

    sizes: BaselineSizes
    factors: Factors
    mean: Float[Tensor, "p d"] | None
    """mean of the normalised experts, where the method stores one"""
    activation: str
    lam: float
    relfrob: float
    """from the residual of the returned factors, on the normalised experts"""
    history: tuple[BaselinePoint, ...]
    stop: StopReason

    @property
    def kept(self) -> float:
        return self.sizes.kept

    @property
    def steps(self) -> int:
        return self.history[-1].step

    @property
    def seconds(self) -> float:
        return self.history[-1].seconds
