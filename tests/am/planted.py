"""Small problems whose answer is known, and the configurations that fit them. All sizes differ from each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import FitResult, Sizes, StepRecord
from globe.config.choices import Activation, CurvatureDtype, Curve, FirstCodes, Seeding
from globe.config.fit_options import CurveConfig
from globe.config.schema import BankConfig, CodesConfig, Config, InitConfig, ScheduleConfig, TrainConfig
from globe.fit.options import fit_options
from globe.numerics.activation import phi

N, P, D, M, R = 17, 10, 14, 3, 4
"""of most fits here"""


class Plant(NamedTuple):
    """X_i = A_i phi_lam(sum_j alpha_ij B_j) (+ noise), with the factors that made it."""

    X: Float[Tensor, "n p d"]
    bank: Float[Tensor, "m r d"]
    codes: Float[Tensor, "n m"]
    left: Float[Tensor, "m r k"] | None
    right: Float[Tensor, "m k d"] | None


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plant(
    n: int = N,
    p: int = P,
    d: int = D,
    m: int = M,
    r: int = R,
    *,
    k: int | None = None,
    activation: str = "identity",
    lam: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Plant:
    """Gaussian factors, |Gaussian| codes, mixed bases of unit deviation and experts of unit deviation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left = right = None
    if k is None:
        bank = draw(m, r, d)
    else:
        left, right = draw(m, r, k), draw(m, k, d)
        bank = left @ right
    codes = draw(n, m).abs()
    codes = codes / torch.einsum("ij,jrd->ird", codes, bank).std()
    bases = phi(torch.einsum("ij,jrd->ird", codes, bank), lam=lam, activation=activation)
    X = draw(n, p, r) @ bases
    X = X / X.std() + noise * draw(n, p, d)
    return Plant(*(None if t is None else t.to(dtype) for t in (X, bank, codes, left, right)))  # type: ignore[arg-type]


_EXACT = {
    "steps": 12,
    "patience": 0,
    "curvature_dtype": CurvatureDtype.same,
    "lambda_A": 0.0,
    "cg_iterations": 20,
    "cg_tolerance": 0.0,
}
"""What fits exact problems exactly: no ridge, no early end of a fit or of the conjugate gradients."""


def configured(
    *,
    activation: str = "identity",
    lam: float = 0.0,
    init: InitConfig | None = None,
    codes: dict[str, Any] | None = None,
    schedule: dict[str, CurveConfig] | None = None,
    **train: Any,
) -> Config:
    """A configuration with lam frozen unless `schedule` says otherwise, and no early stop unless asked for.

    The default start, gauge-aligned picks with codes by least squares, is the one that finds planted answers: from
    starts whose atoms stand in unrelated gauges most of these tiny problems end in another minimum.
    """
    curves = {"lam": CurveConfig(Curve.constant, lam, lam)} | (schedule or {})
    return Config(
        bank=BankConfig(activation=Activation(activation)),
        init=init or InitConfig(seeding=Seeding.aligned, codes=FirstCodes.nnls),
        codes=CodesConfig(**(codes or {})),
        schedule=ScheduleConfig(**curves),
        train=TrainConfig(**(_EXACT | train)),
    )


def sizes_of(X: Float[Tensor, "n p d"], m: int = M, r: int = R, **more: Any) -> Sizes:
    return Sizes(*X.shape, m, r, **more)


def fitted(
    X: Float[Tensor, "n p d"],
    sizes: Sizes,
    config: Config,
    *,
    seed: int = 0,
    export_dtype: torch.dtype | None = None,
    **more: Any,
) -> tuple[FitResult, list[StepRecord]]:
    """A fit and the record of its steps."""
    records: list[StepRecord] = []
    generator = torch.Generator().manual_seed(seed)
    options = fit_options(config, export_dtype=export_dtype)
    result = fit_bank(X, sizes, options, generator=generator, on_step=records.append, **more)
    return result, records
