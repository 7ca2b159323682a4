"""Which errors of an expert matter: weights of its rows, and a metric of the directions that its inputs have.

An error E of an expert counts as ||D E L||_F^2 in the place of ||E||_F^2, with a diagonal D over its rows and
C = L L^T over its columns. An error in a direction that no input has, or in a row that the output hardly depends on,
costs little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors
from globe.config.choices import Metric as Choice
from globe.config.schema import Config
from globe.numerics.chunks import expert_chunks
from globe.numerics.figures import squared_norms
from globe.numerics.group import ALONE, ProcessGroup
from globe.numerics.metric import Metric, metric_of_roots, root_of, times_inverse

_FLOOR = 1e-3
"""Weight of a direction that no row has, beside the mean of 1. It bounds what an error there may become."""


@dataclass(frozen=True, slots=True, eq=False)
class InputMetric:
    """D and L of every expert; None stands for the identity."""

    columns: Metric | None
    rows: Float[Tensor, "n p"] | None = None

    def seen(self, E: Float[Tensor, "c p d"], part: slice) -> Float[Tensor, "c p d"]:
        """D_i E_i L_i for the experts of `part`."""
        if self.columns is not None:
            E = self.columns.times(E, part)
        return E if self.rows is None else E * self.rows[part].unsqueeze(2)

    def enter(self, X: Float[Tensor, "n p d"]) -> None:
        """Put D_i X_i L_i in the place of X_i: a copy would be as large as all else that a fit holds."""
        for part in expert_chunks(*X.shape):
            X[part] = self.seen(X[part], part)

    def leave(self, X: Float[Tensor, "n p d"]) -> None:
        """Undo `enter`, but for rounding: at most 1e-5 of X in float32."""
        for part in expert_chunks(*X.shape):
            own = X[part] if self.rows is None else X[part] / self.rows[part].unsqueeze(2)
            X[part] = own if self.columns is None else self.columns.solved(own, part)

    def norms(self, E: Float[Tensor, "n p d"], start: int = 0) -> Float[Tensor, " n"]:
        """||D_i E_i L_i||_F^2 of experts that begin with expert `start`."""
        parts = [
            self.seen(E[part], slice(start + part.start, start + part.stop))
            for part in expert_chunks(*E.shape)
        ]
        return torch.cat([squared_norms(part) for part in parts])

    def bases(self, M: Float[Tensor, "c r d"], part: slice) -> Float[Tensor, "c r d"]:
        """M_i L_i for the experts of `part`."""
        return M if self.columns is None else self.columns.times(M, part)

    def adapters(self, A: Float[Tensor, "c p r"], part: slice) -> Float[Tensor, "c p r"]:
        """D_i^-1 A_i: adapters fitted to D_i X_i L_i as those of X_i."""
        return A if self.rows is None else A / self.rows[part].unsqueeze(2)

    def weighted(self, A: Float[Tensor, "c p r"], part: slice) -> Float[Tensor, "c p r"]:
        """D_i A_i: undo `adapters`."""
        return A if self.rows is None else A * self.rows[part].unsqueeze(2)

    def kernel(self, *, linear: bool) -> Metric | None:
        """What a fit to D_i X_i L_i has to know of L; nothing where its bank may stand for B L, since phi is linear and
        all experts have one L."""
        return None if linear and self._one else self.columns

    def of_model(self, factors: Factors, *, linear: bool) -> Factors:
        """Factors that a fit with that kernel gave, as those of X_i."""
        factors = factors._replace(adapters=self.adapters(factors.adapters, slice(None)))
        if self.columns is None or not (linear and self._one):
            return factors
        bank = times_inverse(factors.bank, self.columns.roots[0])
        right = None if factors.right is None else times_inverse(factors.right, self.columns.roots[0])
        return factors._replace(bank=bank, right=right)

    @property
    def _one(self) -> bool:
        return self.columns is not None and len(self.columns.roots) == 1


def second_moment_metric(X: Float[Tensor, "n p d"], group: ProcessGroup = ALONE) -> InputMetric | None:
    """The metric of the experts' own rows: C = sum_i X_i^T X_i + floor for all, scaled so that ||X L|| = ||X||.

    Trained weights are sums of gradients g x^T, so the rows of all experts together lean to the directions that inputs
    have; no text is needed. Directions without any energy keep 1e-3 of the mean eigenvalue. Zero experts give None, the
    plain metric. In float64 where the device has it, whatever the dtype of X.
    """
    d = X.shape[2]
    wide = torch.float32 if X.device.type == "mps" else torch.float64
    C = torch.zeros(d, d, dtype=wide, device=X.device)
    for part in expert_chunks(*X.shape):
        rows = X[part].flatten(0, 1)
        C += (rows.T @ rows).to(wide)
    C = group.sum(C)
    mean = float(C.diagonal().mean())
    if mean <= 0:
        return None
    C /= mean
    weighted = C.clone()
    weighted.diagonal().add_(_FLOOR)
    # of an energy of d in all, tr(C weighted) is what the metric makes of it
    weighted *= d / float((C * weighted).sum())
    columns = metric_of_roots(group.same(root_of(weighted).to(X.dtype))[None], group=group)
    return None if columns is None else InputMetric(columns)


def metric_of(config: Config, X: Float[Tensor, "n p d"], group: ProcessGroup = ALONE) -> InputMetric | None:
    """The metric that `normalise.metric` asks for; None is the plain Frobenius norm."""
    return second_moment_metric(X, group) if config.normalise.metric is Choice.experts else None
