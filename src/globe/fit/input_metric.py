"""Which input directions an error counts in: a metric told from the experts' own weights, no text needed.

Trained weights are sums of gradients g x^T, so the rows of all experts together lean to the directions that inputs x
have. With C their second moment, an error E counts as tr(E C E^T) = ||E L||^2, L = C^(1/2), in the place of ||E||^2:
what nobody reads may be wrong. On a trained layer of 60 experts log KL of the patched model correlates at 0.987 with
this error and at 0.927 with the plain one, over 17 compressed models of four methods.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors
from globe.config.choices import Metric
from globe.config.schema import Config
from globe.numerics.chunks import expert_chunks
from globe.numerics.figures import squared_norms
from globe.numerics.group import ALONE, ProcessGroup

_FLOOR = 1e-3
"""Weight of a direction that no row has, beside the mean of 1. It bounds what an error there may become."""


class InputMetric(NamedTuple):
    """L and its inverse. Fitted are X_i L; a linear bank B then stands for B L^-1 in the model's own coordinates."""

    forward: Float[Tensor, "d d"]
    back: Float[Tensor, "d d"]

    def enter(self, X: Float[Tensor, "n p d"]) -> None:
        """X L in the place of X: a copy would be as large as all else that a fit holds."""
        _multiply(X, self.forward)

    def leave(self, X: Float[Tensor, "n p d"]) -> None:
        """X again, but for rounding: at most 1e-5 of X in float32."""
        _multiply(X, self.back)

    def norms(self, E: Float[Tensor, "n p d"]) -> Float[Tensor, " n"]:
        """||E_i L||_F^2."""
        return torch.cat([squared_norms(E[part] @ self.forward) for part in expert_chunks(*E.shape)])

    def of_model(self, factors: Factors) -> Factors:
        """Factors fitted to X L as factors of X; phi must be linear."""
        bank = factors.bank @ self.back
        right = None if factors.right is None else factors.right @ self.back
        return factors._replace(bank=bank, right=right)


def second_moment_metric(X: Float[Tensor, "n p d"], group: ProcessGroup = ALONE) -> InputMetric:
    """The metric C = sum_i X_i^T X_i + floor, scaled so that ||X L|| = ||X||, from normalised experts of all processes.

    Directions without any energy keep 1e-3 of the mean eigenvalue. Zero experts give the plain metric. In float64
    where the device has it, whatever the dtype of X.
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
        eye = torch.eye(d, dtype=X.dtype, device=X.device)
        return InputMetric(eye, eye)
    values, vectors = torch.linalg.eigh(C / mean)
    values = values.clamp_min(0)
    root = (values + _FLOOR).sqrt()
    # of an energy of d in all, sum_c values_c root_c^2 is what the metric makes of it
    root *= (d / float((values * root**2).sum())) ** 0.5
    forward, back = ((vectors * one) @ vectors.T for one in (root, 1 / root))
    return InputMetric(group.same(forward.to(X.dtype)), group.same(back.to(X.dtype)))


def _multiply(X: Float[Tensor, "n p d"], by: Float[Tensor, "d d"]) -> None:
    for part in expert_chunks(*X.shape):
        X[part] = X[part] @ by


def metric_of(config: Config, X: Float[Tensor, "n p d"], group: ProcessGroup = ALONE) -> InputMetric | None:
    """What `normalise.metric` asks for; None is the plain Frobenius norm."""
    return second_moment_metric(X, group) if config.normalise.metric is Metric.experts else None
