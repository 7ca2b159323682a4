"""MoBE, Mixture of Basis Experts (arXiv 2508.05257): X_i ~ A_i phi(sum_j softmax(z_i)_j B_j), by Adam.

Its public script (inclusionAI/MoBE, December 2025) trains full batch with Adam at 0.07, without schedule or
decay, on experts divided by one standard deviation. Two starts are offered.

Published, its defects kept. An SVD per group of neighbouring experts gives A = U S and B = V^T of the
*unscaled* weights, while the target is scaled; the one-hot codes enter as *logits*, so that an expert's own
basis has weight e / (e + m - 1) instead of one; and phi comes between A and B, which knew nothing of it. The
first error is therefore near one.

Corrected. Groups by K-subspaces; bases small enough for phi to be nearly linear; logits whose softmax *is*
the intended mixture; A by least squares through phi, the least error those bases and codes allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.refit import refit
from globe.bank.compose import mixed_bases
from globe.baselines.adam import grad, leaf
from globe.baselines.group_svd import consecutive_groups, k_subspaces
from globe.baselines.mixture import Mixture
from globe.numerics.metric import Metric, root_of, times_inverse

LEARNING_RATE = 0.07
"""Published: the paper's setting and the script's default."""

OWN_WEIGHT = 0.65
"""Weight of an expert's own basis in the corrected start, the rest spread evenly. Of 0.2, 0.35, 0.5, 0.65
and 0.9 the best after 100 to 600 steps on 60 trained experts (m = 15, r = p/2)."""

BASIS_SCALE = 0.25
"""Standard deviation of the entries of the corrected start's mixed bases. Of 0.1, 0.25, 0.5 and 1 the best
there as well."""


class SoftmaxFactors(NamedTuple):
    """A_i, B_j and the logits z of the codes."""

    adapters: Float[Tensor, "n p r"]
    bank: Float[Tensor, "m r d"]
    logits: Float[Tensor, "n m"]


def published_start(
    X: Float[Tensor, "n p d"], *, m: int, r: int, weights_std: float, metric: Metric | None = None
) -> SoftmaxFactors:
    """Return the script's start. `weights_std` is the standard deviation of the weights before their scaling to X.

    In a metric the start is that of the experts as the mean metric sees them, its bases brought back from there.

    Groups differ by one in size where m does not divide n; the script leaves the last experts without
    adapters there.
    """
    n, p, d = X.shape
    X = X if metric is None else metric.in_mean(X)
    groups = consecutive_groups(n, m).to(X.device)
    A, B = X.new_empty(n, p, r), X.new_empty(m, r, d)
    for j in range(m):
        members = groups == j
        # LAPACK's own signs, as in the script: phi tells a basis from its negative
        U, S, Vt = torch.linalg.svd(X[members].reshape(-1, d), full_matrices=False)
        A[members] = (U[:, :r] * (weights_std * S[:r])).view(-1, p, r)
        B[j] = Vt[:r]
    if metric is not None:
        B = times_inverse(B, root_of(metric.mean))
    return SoftmaxFactors(A, B, torch.nn.functional.one_hot(groups, m).to(X))


def corrected_start(
    X: Float[Tensor, "n p d"],
    *,
    m: int,
    r: int,
    activation: str,
    own: float = OWN_WEIGHT,
    scale: float = BASIS_SCALE,
    generator: torch.Generator | None = None,
    metric: Metric | None = None,
) -> SoftmaxFactors:
    """Return a warm start in the published form: softmax(z_i) has `own` on the expert's group, the rest is even.

    With m = 1 the only weight is one. An `own` below 1/m would favour the other groups.
    """
    n, _, d = X.shape
    B, groups = k_subspaces(X if metric is None else metric.in_mean(X), m=m, r=r, generator=generator)
    if metric is not None:
        B = times_inverse(B, root_of(metric.mean))
    logits = X.new_zeros(n, m)
    if m > 1:
        # softmax([c, 0, ..., 0])_1 = e^c / (e^c + m - 1) = own
        logits[torch.arange(n, device=X.device), groups] = math.log(own * (m - 1) / (1 - own))
    codes = torch.softmax(logits, 1)
    spread = torch.linalg.vector_norm(codes @ B.flatten(1)) / math.sqrt(n * r * d)
    B = B * (scale / spread)
    M = mixed_bases(codes, B, lam=1.0, activation=activation)
    A = refit(X, M if metric is None else metric.times(M, slice(0, n))).adapters
    return SoftmaxFactors(A, B, logits)


class MobeObjective:
    """The trainable state of MoBE: adapters, bank, logits."""

    def __init__(
        self,
        X: Float[Tensor, "n p d"],
        start: SoftmaxFactors,
        *,
        activation: str,
        metric: Metric | None = None,
    ) -> None:
        self.mixture = Mixture(X, r=start.bank.shape[1], activation=activation, metric=metric)
        self.factors = SoftmaxFactors(*(leaf(factor) for factor in start))

    @property
    def parameters(self) -> Sequence[Tensor]:
        return self.factors

    @torch.no_grad()
    def forward(self) -> None:
        self.mixture.residual(*self.factors)

    def relfrob(self) -> float:
        return self.mixture.relfrob()

    @torch.no_grad()
    def backward(self) -> None:
        A, B, z = self.factors
        self.mixture.gradient(A, B, out_A=grad(A), out_B=grad(B), out_z=grad(z))
