"""SLBF, Shared Low-rank Basis Factorization (arXiv 2610.09342): MoBE with atoms U_j V_j of rank k, m = n.

    X_i ~ A_i phi(sum_j softmax(z_i)_j U_j V_j)

Its public trainer (ctxGou/MoE-Compression, 2026) uses AdamW with decay 0.02, a rate of 0.10 for {A, z} and
rho times that for {U, V}, all on one cosine down to 1e-4, and the "matrix-sign" start: singular subspaces
without the spectrum, and a logit of one on an expert's own atom, deliberately soft so that the other atoms
see a gradient. Experts are divided by one standard deviation. At the end each atom's gauge is fixed, which
frees k^2 of its k (r + d) parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.baselines.adam import grad, leaf
from globe.baselines.mixture import Mixture
from globe.numerics.metric import Metric, root_of, times_inverse

LEARNING_RATE = 0.10
"""Published for {A, z} of models with many experts; 0.03 for the eight of Mixtral."""

ATOM_LEARNING_RATE = 0.03
"""Published for {U, V}: 0.022 to 0.036 by model; 0.003 for Mixtral."""

WEIGHT_DECAY = 0.02
COSINE_FLOOR = 1e-4


class LowRankFactors(NamedTuple):
    """A_i, U_j, V_j and the logits z of the codes."""

    adapters: Float[Tensor, "n p r"]
    atoms_left: Float[Tensor, "m r k"]
    atoms_right: Float[Tensor, "m k d"]
    logits: Float[Tensor, "n m"]


def matrix_sign_start(
    X: Float[Tensor, "n p d"], *, r: int, atom_rank: int, metric: Metric | None = None
) -> LowRankFactors:
    """Start with the r leading left singular vectors of X_i as A_i, the k right ones as V_i, U_i = [I_k; 0] and z = I.

    1 <= k = atom_rank <= r <= min(p, d). In a metric they are those of the experts as the mean metric sees them, V_i
    brought back from there.
    """
    n = X.shape[0]
    X = X if metric is None else metric.in_mean(X)
    # LAPACK's own signs, as in the trainer: phi tells a basis from its negative
    left, _, right = torch.linalg.svd(X, full_matrices=False)
    U = torch.eye(r, atom_rank).to(X).expand(n, -1, -1)
    V = right[:, :atom_rank]
    V = V if metric is None else times_inverse(V, root_of(metric.mean))
    return LowRankFactors(left[..., :r], U, V, torch.eye(n).to(X))


class SlbfObjective:
    """The trainable state of SLBF: adapters, both factors of the atoms, logits."""

    def __init__(
        self,
        X: Float[Tensor, "n p d"],
        start: LowRankFactors,
        *,
        activation: str,
        metric: Metric | None = None,
    ) -> None:
        m, r, _ = start.atoms_left.shape
        self.mixture = Mixture(X, r=r, activation=activation, metric=metric)
        self.factors = LowRankFactors(*(leaf(factor) for factor in start))
        self.B = X.new_empty(m, r, X.shape[2])
        self.dB = torch.empty_like(self.B)

    @property
    def parameters(self) -> Sequence[Tensor]:
        return self.factors

    @torch.no_grad()
    def forward(self) -> None:
        A, U, V, z = self.factors
        torch.bmm(U, V, out=self.B)
        self.mixture.residual(A, self.B, z)

    def relfrob(self) -> float:
        return self.mixture.relfrob()

    @torch.no_grad()
    def backward(self) -> None:
        A, U, V, z = self.factors
        self.mixture.gradient(A, self.B, out_A=grad(A), out_B=self.dB, out_z=grad(z))
        torch.bmm(self.dB, V.mT, out=grad(U))
        torch.bmm(U.mT, self.dB, out=grad(V))
