"""Which columns of an error count, expert by expert: E_i counts as ||E_i L_i||_F^2 = tr(E_i C_i E_i^T)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.numerics.chunks import expert_chunks
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.precision import to_float64


class Metric(NamedTuple):
    """Lower triangular roots L_i of the experts' metrics C_i = L_i L_i^T, whose mean eigenvalues are near 1.

    Kernels take the experts as the metric sees them, X_i L_i, and multiply their approximations A_i M_i by L_i
    themselves. No Metric at all stands for L_i = I.
    """

    roots: Float[Tensor, "k d d"]
    """one for each of k experts, or the one that all share"""
    mean: Float[Tensor, "d d"]
    """the mean of C_i over the experts of all processes"""
    which: Int[Tensor, " n"] | None = None
    """root of every expert, where several experts share one; None takes them in order"""
    common: bool = False
    """whether the experts of all processes share one root"""

    def of(self, part: slice) -> Float[Tensor, "*c d d"]:
        """Return L of some experts, or the one that all share."""
        if self.common:
            return self.roots[0]
        return self.roots[part] if self.which is None else self.roots[self.which[part]]

    def times(self, M: Float[Tensor, "c rows d"], part: slice) -> Float[Tensor, "c rows d"]:
        """Return M_i L_i for the experts of `part`."""
        return M @ self.of(part)

    def adjoint(self, F: Float[Tensor, "c rows d"], part: slice) -> Float[Tensor, "c rows d"]:
        """Return F_i L_i^T for the experts of `part`: a gradient in M_i L_i as one in M_i."""
        return F @ self.of(part).mT

    def solved(self, T: Float[Tensor, "c rows d"], part: slice) -> Float[Tensor, "c rows d"]:
        """Return T_i L_i^-1 for the experts of `part`, which undoes `times` up to rounding."""
        return times_inverse(T, self.of(part))

    def in_mean(self, X: Float[Tensor, "n p d"]) -> Float[Tensor, "n p d"]:
        """Return experts X_i L_i as the mean metric sees them: a copy for what asks for one metric of all experts."""
        if self.common:
            return X
        root = root_of(self.mean)
        seen = torch.empty_like(X)
        for part in expert_chunks(*X.shape):
            seen[part] = self.solved(X[part], part) @ root
        return seen


def metric_of_roots(
    roots: Float[Tensor, "k d d"],
    which: Int[Tensor, " n"] | None = None,
    *,
    common: bool = False,
    group: ProcessGroup = ALONE,
) -> Metric | None:
    """Return the metric with these roots; None where all of them are the identity, which is the plain metric."""
    d = roots.shape[1]
    eye = torch.eye(d, dtype=roots.dtype, device=roots.device)
    if not group.any(not all(torch.equal(root, eye) for root in roots)):
        return None
    count = torch.ones(len(roots)) if which is None else torch.bincount(which, minlength=len(roots)).cpu()
    mean = to_float64(roots[0]).new_zeros(d, d)
    for root, share in zip(roots, (count.double() / count.sum()).tolist(), strict=True):
        wide = to_float64(root)
        mean.addmm_(wide, wide.T, alpha=share)
    return Metric(roots, group.same(group.average(mean).to(roots)), which, common)


def root_of(C: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k d d"]:
    """Return the lower triangular L with L L^T = C for positive definite C, made in float64, in the dtype of C."""
    return torch.linalg.cholesky(to_float64(C)).to(C)


def times_inverse(T: Float[Tensor, "*c rows d"], root: Float[Tensor, "*k d d"]) -> Float[Tensor, "*c rows d"]:
    """Return T root^-1 for a lower triangular root of all, or one of each."""
    return torch.linalg.solve_triangular(root, T, upper=False, left=False)
