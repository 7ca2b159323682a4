"""How an error of an expert counts: ||D_i E_i L_i||_F^2, with weights of its rows and a metric of its columns.

An error in a direction that no input has, or in a row that the output hardly depends on, costs little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.numerics.chunks import expert_chunks
from globe.numerics.figures import squared_norms
from globe.numerics.metric import Metric, root_of
from globe.numerics.precision import to_float64


@dataclass(frozen=True, slots=True, eq=False)
class InputMetric:
    """D and L of every expert; None stands for the identity."""

    columns: Metric | None
    rows: Tensor | None = None
    """weights of the rows (n, p), or upper triangular matrices (n, p, p)"""

    def seen(self, E: Float[Tensor, "c p d"], part: slice) -> Float[Tensor, "c p d"]:
        """Return D_i E_i L_i for the experts of `part`."""
        return self.weighted(self.bases(E, part), part)

    def enter(self, X: Float[Tensor, "n p d"]) -> None:
        """Put D_i X_i L_i in the place of X_i: a copy would be as large as all else that a fit holds."""
        for part in expert_chunks(*X.shape):
            X[part] = self.seen(X[part], part)

    def leave(self, X: Float[Tensor, "n p d"]) -> None:
        """Undo `enter`, but for rounding: at most 1e-5 of X in float32."""
        for part in expert_chunks(*X.shape):
            X[part] = self.unseen(X[part], part)

    def unseen(self, E: Float[Tensor, "c p d"], part: slice) -> Float[Tensor, "c p d"]:
        """Return D_i^-1 E_i L_i^-1 for the experts of `part`, which undoes `seen` but for rounding."""
        own = self.adapters(E, part)
        return own if self.columns is None else self.columns.solved(own, part)

    def norms(self, E: Float[Tensor, "n p d"], start: int = 0) -> Float[Tensor, " n"]:
        """Return ||D_i E_i L_i||_F^2 of experts that begin with expert `start`."""
        parts = [
            self.seen(E[part], slice(start + part.start, start + part.stop))
            for part in expert_chunks(*E.shape)
        ]
        return torch.cat([squared_norms(part) for part in parts]) if parts else to_float64(E.new_zeros(0))

    def bases(self, M: Float[Tensor, "c r d"], part: slice) -> Float[Tensor, "c r d"]:
        """Return M_i L_i for the experts of `part`."""
        return M if self.columns is None else self.columns.times(M, part)

    def weighted(self, A: Float[Tensor, "c p r"], part: slice) -> Float[Tensor, "c p r"]:
        """Return D_i A_i, adapters of X_i as those of D_i X_i L_i."""
        if self.rows is None:
            return A
        rows = self.rows[part]
        return rows.unsqueeze(2) * A if rows.dim() == 2 else rows @ A

    def row_squares(self, part: slice, like: Float[Tensor, "n p d"]) -> Float[Tensor, "c p"]:
        """Return the diagonal of D_i^T D_i: what the square of a row counts for."""
        if self.rows is None:
            return like.new_ones(like[part].shape[:2])
        return self.rows[part].square() if self.rows.dim() == 2 else self.rows[part].square().sum(dim=1)

    def adapters(self, A: Float[Tensor, "c p r"], part: slice) -> Float[Tensor, "c p r"]:
        """Return D_i^-1 A_i, adapters fitted to D_i X_i L_i as those of X_i."""
        if self.rows is None:
            return A
        rows = self.rows[part]
        if rows.dim() == 2:
            return A / rows.unsqueeze(2)
        return torch.linalg.solve_triangular(rows, A, upper=True)

    def adjoint_weighted(self, F: Float[Tensor, "c p d"], part: slice) -> Float[Tensor, "c p d"]:
        """Return D_i^T F_i L_i^T, a gradient in D_i E_i L_i as one in E_i."""
        F = F if self.columns is None else self.columns.adjoint(F, part)
        if self.rows is None:
            return F
        rows = self.rows[part]
        return rows.unsqueeze(2) * F if rows.dim() == 2 else rows.mT @ F

    def kernel(self, *, linear: bool) -> Metric | None:
        """Return what a fit to D_i X_i L_i has to know of L.

        Nothing where phi is linear and all experts have one L: the bank of such a fit stands for B L.
        """
        return None if linear and self.one_root is not None else self.columns

    def block(self, rows: Int[Tensor, "n q"], columns: Int[Tensor, " c"]) -> InputMetric:
        """Return the metric of some rows of every expert and some columns of all: the parts of each C_i and D_i."""
        weights, part = self.rows, self.columns
        if weights is not None and weights.dim() == 2:
            weights = weights.gather(1, rows)
        elif weights is not None:
            chosen = torch.stack([one[:, own] for one, own in zip(weights, rows, strict=True)])
            weights = root_of(chosen.mT @ chosen).mT
        if part is not None:
            chosen = part.roots[:, columns]
            mean = part.mean[columns][:, columns]
            part = part._replace(roots=root_of(chosen @ chosen.mT), mean=mean)
        return InputMetric(part, weights)

    @property
    def one_root(self) -> Float[Tensor, "d d"] | None:
        """L, where all experts have one."""
        if self.columns is None or not self.columns.common:
            return None
        return self.columns.roots[0]
