"""Value and gradient of the softmax-mixture objective that MoBE and SLBF minimise, without autograd.

    f(A, B, z) = 1/(n p d) sum_i || A_i phi(Y_i) - X_i ||_F^2,    Y_i = sum_j w_ij B_j,    w_i = softmax(z_i)

With R_i = 2/(n p d) (A_i M_i - X_i), M = phi(Y):

    df/dA_i = R_i M_i^T     df/dY_i = phi'(Y_i) * (A_i^T R_i)     df/dB_j = sum_i w_ij df/dY_i
    df/dw_ij = <df/dY_i, B_j>     df/dz_i = w_i * (df/dw_i - <w_i, df/dw_i>)

In a metric X_i and M_i stand for X_i L_i and M_i L_i, and A_i^T R_i is multiplied by L_i^T.

Three products of n p r d, three of n m r d; the buffers (one n x p x d, two n x r x d) are made once.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from globe.errors import ConfigError
from globe.numerics.chunks import expert_chunks
from globe.numerics.metric import Metric

aten = torch.ops.aten


class Mixture:
    """Buffers of one problem. `residual` must come before `gradient`, with the same factors."""

    def __init__(
        self, X: Float[Tensor, "n p d"], *, r: int, activation: str, metric: Metric | None = None
    ) -> None:
        if activation not in ("identity", "silu", "tanh"):
            raise ConfigError(
                f"activation={activation!r} is not one of the published ones: give silu, tanh or identity"
            )
        n, _, d = X.shape
        self.X = X
        self.activation = activation
        self.scale = 2 / X.numel()
        self.norm = torch.linalg.vector_norm(X)
        self.Y = X.new_empty(n, r, d)
        self.M = self.Y if activation == "identity" else torch.empty_like(self.Y)
        self.metric = metric
        self.seen = self.M if metric is None else X.new_empty(n, r, d)
        self.R = torch.empty_like(X)
        self.w = X.new_empty(0)

    def residual(self, A: Float[Tensor, "n p r"], B: Float[Tensor, "m r d"], z: Float[Tensor, "n m"]) -> None:
        """Fill w, Y, M and the scaled residual R."""
        self.w = torch.softmax(z, 1)
        torch.mm(self.w, B.flatten(1), out=self.Y.flatten(1))
        match self.activation:
            case "silu":
                aten.silu.out(self.Y, out=self.M)
            case "tanh":
                torch.tanh(self.Y, out=self.M)
        if self.metric is not None:
            for part in expert_chunks(*self.M.shape):
                self.seen[part] = self.metric.times(self.M[part], part)
        torch.baddbmm(self.X, A, self.seen, beta=-self.scale, alpha=self.scale, out=self.R)

    def relfrob(self) -> float:
        """Return RelFrob of the last residual; on an accelerator this waits for it."""
        return (torch.linalg.vector_norm(self.R) / (self.scale * self.norm)).item()

    def gradient(
        self,
        A: Float[Tensor, "n p r"],
        B: Float[Tensor, "m r d"],
        *,
        out_A: Float[Tensor, "n p r"],
        out_B: Float[Tensor, "m r d"],
        out_z: Float[Tensor, "n m"],
    ) -> None:
        """Write the three gradients; overwrites Y, and M unless phi is tanh, whose slope needs it."""
        torch.bmm(self.R, self.seen.mT, out=out_A)
        match self.activation:
            case "silu":
                self._pull(A, self.M)
                aten.silu_backward.grad_input(self.M, self.Y, grad_input=self.Y)
            case "tanh":
                self._pull(A, self.Y)
                aten.tanh_backward.grad_input(self.Y, self.M, grad_input=self.Y)
            case _:
                self._pull(A, self.Y)
        dY = self.Y.flatten(1)
        torch.mm(self.w.mT, dY, out=out_B.flatten(1))
        dw = dY @ B.flatten(1).mT
        out_z.copy_(self.w * (dw - (self.w * dw).sum(1, keepdim=True)))

    def _pull(self, A: Float[Tensor, "n p r"], out: Float[Tensor, "n r d"]) -> None:
        """Return A_i^T R_i L_i^T, the gradient in the bases."""
        torch.bmm(A.mT, self.R, out=out)
        if self.metric is not None:
            for part in expert_chunks(*out.shape):
                out[part] = self.metric.adjoint(out[part], part)
