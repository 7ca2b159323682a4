"""Mean expert plus truncated SVD of the differences: the structure of D2-MoE, from weights alone.

D2-MoE (arXiv 2502.17298) weights the mean by Fisher information and whitens the differences with
activations. Without data both weights are uniform, which leaves the plain mean and the plain truncated SVD.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors
from globe.baselines.svd import svd


def mean_svd(X: Float[Tensor, "n p d"], *, r: int) -> tuple[Factors, Float[Tensor, "p d"]]:
    """Return the rank-r SVD A_i B_i of X_i - mean, and mean = 1/n sum_i X_i, whose p d numbers count in the budget.

    Equal experts are reproduced by the mean alone, with zero adapters.
    """
    mean = X.mean(0)
    return svd(X - mean, r=r), mean
