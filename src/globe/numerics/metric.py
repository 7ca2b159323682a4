"""Which columns of an error count, expert by expert: E_i counts as ||E_i L_i||_F^2."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.numerics.chunks import expert_chunks
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.precision import to_float64


class Metric(NamedTuple):
    """Symmetric positive definite roots L_i = C_i^(1/2) of the experts' metrics, of mean eigenvalue near 1.

    Kernels take the experts as they are seen in it, X_i L_i, and multiply their approximations A_i M_i by L_i
    themselves. Since L_i is symmetric, it is its own adjoint. No Metric at all stands for L_i = I.
    """

    roots: Float[Tensor, "k d d"]
    """one for all experts (k = 1), or several"""
    mean: Float[Tensor, "d d"]
    """the mean of L_i^2 over the experts of all processes"""
    which: Int[Tensor, " n"] | None = None
    """root of every expert, where several experts share one; None takes them in order"""

    def of(self, part: slice) -> Float[Tensor, "*c d d"]:
        """L of some experts, or the one that all share."""
        if len(self.roots) == 1:
            return self.roots[0]
        return self.roots[part] if self.which is None else self.roots[self.which[part]]

    def times(self, M: Float[Tensor, "c rows d"], part: slice) -> Float[Tensor, "c rows d"]:
        """M_i L_i for the experts of `part`."""
        return M @ self.of(part)

    def solved(self, T: Float[Tensor, "c rows d"], part: slice) -> Float[Tensor, "c rows d"]:
        """T_i L_i^-1 for the experts of `part`; `times` undoes it up to rounding. d^3 multiply-adds an expert."""
        return times_inverse(T, self.of(part))

    def in_mean(self, X: Float[Tensor, "n p d"]) -> Float[Tensor, "n p d"]:
        """Experts X_i L_i as the mean metric sees them, X_i mean^(1/2): a copy, for what asks for one metric."""
        if len(self.roots) == 1:
            return X
        root = square_root(self.mean)
        seen = torch.empty_like(X)
        for part in expert_chunks(*X.shape):
            seen[part] = self.solved(X[part], part) @ root
        return seen

    def own(self, rows: slice) -> Metric:
        """The metric of some of the experts."""
        if len(self.roots) == 1:
            return self
        if self.which is None:
            return self._replace(roots=self.roots[rows])
        return self._replace(which=self.which[rows])


def metric_of_roots(
    roots: Float[Tensor, "k d d"], which: Int[Tensor, " n"] | None = None, *, group: ProcessGroup = ALONE
) -> Metric | None:
    """The metric with these roots; None where all of them are the identity, which is the plain metric."""
    d = roots.shape[1]
    eye = torch.eye(d, dtype=roots.dtype, device=roots.device)
    if not group.any(not all(torch.equal(root, eye) for root in roots)):
        return None
    count = roots.new_ones(len(roots)) if which is None else torch.bincount(which, minlength=len(roots))
    mean = to_float64(roots[0]).new_zeros(d, d)
    for root, share in zip(roots, (count / count.sum()).tolist(), strict=True):
        wide = to_float64(root)
        mean.addmm_(wide, wide, alpha=share)
    return Metric(roots, group.average(mean).to(roots), which)


def square_root(C: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k d d"]:
    """The symmetric root of symmetric positive semidefinite matrices, made in float64, in their own dtype."""
    values, vectors = torch.linalg.eigh(to_float64(C))
    return ((vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT).to(C)


def times_inverse(T: Float[Tensor, "*c rows d"], root: Float[Tensor, "*c d d"]) -> Float[Tensor, "*c rows d"]:
    """T root^-1 by Cholesky factors of a symmetric positive definite root."""
    return torch.cholesky_solve(T.mT, torch.linalg.cholesky(root)).mT
