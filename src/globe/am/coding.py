"""The coding step: entmax chooses each expert's support, non-negative least squares chooses the values on it.

Least squares works in the projected metric of the true objective, with the activation linearised, so that it sees
what the adapters will absorb; it can bring back an atom that entmax's gradient (zero off the support) cannot.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from globe.am.nnls import logits_from_codes, nnls_codes
from globe.am.objective import Point
from globe.am.temperature import support_from_logits
from globe.numerics.chunks import expert_chunks

_DAMPING = 1e-3
"""Relative ridge towards the present codes: their scale along Y_i itself is free and would drift."""


def contributions(codes: Float[Tensor, "n m"], bank: Float[Tensor, "m r d"]) -> Float[Tensor, "n m"]:
    """Return alpha_ij ||B_j||_F: what an atom adds to an expert, whatever the gauge."""
    return codes * torch.linalg.vector_norm(bank, dim=(1, 2))


def entmax_support(
    codes: Float[Tensor, "n m"], bank: Float[Tensor, "m r d"], *, temperature: float, code_map: str
) -> Bool[Tensor, "n m"]:
    """Return the support of map(z_i / T), with z the exact pre-image of the present contributions at T = 1.

    T = 1 keeps the present support, a lower T drops the smallest contributions, a higher one lets atoms back in.
    Never empty.
    """
    logits, _ = logits_from_codes(contributions(codes, bank), code_map=code_map)
    return support_from_logits(logits, temperature, code_map=code_map)


def support_of_median(
    codes: Float[Tensor, "n m"], bank: Float[Tensor, "m r d"], *, median: int, code_map: str
) -> Bool[Tensor, "n m"]:
    """Return the entmax support at the highest temperature whose median support is at most `median`.

    Bisection on T, in which the median support is monotone; where equal contributions make it jump over the target
    the result stands below it, and where they are an expert's largest they are parted by their order. Supports that
    already meet the target are returned as they are.
    """
    present = codes > 0
    if median_support(present) <= median:
        return present
    low, high = 1e-4, 1.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        support = present & entmax_support(codes, bank, temperature=middle, code_map=code_map)
        if median_support(support) <= median:
            low = middle
        else:
            high = middle
    support = present & entmax_support(codes, bank, temperature=low, code_map=code_map)
    if median_support(support) > median:
        # largest contributions so close together that no temperature parts them
        ranks = contributions(codes, bank).argsort(dim=1, descending=True).argsort(dim=1)
        support &= ranks < median
    return support


def median_support(codes: Shaped[Tensor, "n m"]) -> float:
    """Return the median number of atoms in use: the mean of the middle two for an even number of experts."""
    return float((codes > 0).sum(dim=1).double().cpu().quantile(0.5))


def code_system(
    bank: Float[Tensor, "m r d"], point: Point
) -> tuple[Float[Tensor, "n m m"], Float[Tensor, "n m"]]:
    """Return the normal equations of a change of codes: K_i[j, l] = <P B_ij, G_i P B_il>, h_i[j] = <B_j, force_i>.

    B_ij = (J_i * B_j) L_i, P removes the row space of M_i. Costs as much as m conjugate-gradient iterations.
    """
    n, m = len(point.gram), len(bank)
    K, h = bank.new_empty(n, m, m), bank.new_empty(n, m)
    flat = bank.flatten(1)
    for part in expert_chunks(n, *bank.shape[1:]):
        torch.mm(point.force[part].flatten(1), flat.T, out=h[part])
    for i in range(n):
        seen = bank if point.slope is None else bank * point.slope[i]
        if point.metric is not None:
            seen = seen @ point.metric.of(slice(i, i + 1))
        Q = point.rows[i]
        seen = seen - (seen @ Q.T) @ Q
        torch.mm(seen.flatten(1), (point.gram[i] @ seen).flatten(1).T, out=K[i])
    return (K + K.mT) / 2, h


def _rounding(bank: Float[Tensor, "m r d"], point: Point) -> Float[Tensor, " n"]:
    """Return a size below which K is rounding: what a single atom leaves, whose every change the adapters absorb."""
    atom = torch.linalg.vector_norm(bank) ** 2 / len(bank)
    size = point.gram.diagonal(dim1=1, dim2=2).mean(dim=1) * atom
    return (300 * torch.finfo(bank.dtype).eps * size).clamp_min(torch.finfo(bank.dtype).tiny)


def _price(
    diagonal: Float[Tensor, "n m"], codes: Float[Tensor, "n m"], bank: Float[Tensor, "m r d"]
) -> Float[Tensor, "n m"]:
    """Return the slope of sum_j u_j, u_j = alpha_j ||B_j||, while sum_j u_j^2 stays, in the units of K.

    The adapters leave the scale of an expert's codes free, so a price on the sum alone would only shrink them all.
    This one takes from small contributions and gives to large ones.
    """
    norms = torch.linalg.vector_norm(bank, dim=(1, 2)).clamp_min(torch.finfo(bank.dtype).tiny ** 0.25)
    size = codes * norms
    tilt = 1 - size * (size.sum(dim=1) / size.square().sum(dim=1))[:, None]
    unit = (diagonal / norms**2).mean(dim=1) * size.mean(dim=1)
    return unit[:, None] * norms * tilt


def propose_codes(
    bank: Float[Tensor, "m r d"],
    codes: Float[Tensor, "n m"],
    point: Point,
    *,
    support: Bool[Tensor, "n m"] | None = None,
    l1: float = 0.0,
    simplex: bool = False,
) -> Float[Tensor, "n m"]:
    """Minimise the objective, linearised around the present codes, over alpha_i >= 0 on the support.

    1/2 (a - alpha)^T (K + damping) (a - alpha) - h^T (a - alpha) + l1 price^T a (see `_price`). A proposal: the
    caller measures the true objective. An expert whose proposal is all zero keeps its present codes.
    """
    K, h = code_system(bank, point)
    mean = K.diagonal(dim1=1, dim2=2).mean(dim=1)
    eye = torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
    damping = torch.maximum(_DAMPING * mean, _rounding(bank, point))
    K = K + damping[:, None, None] * eye
    H = torch.bmm(K, codes.unsqueeze(2)).squeeze(2) + h
    if l1 > 0 and not simplex:
        H = H - l1 * _price(K.diagonal(dim1=1, dim2=2), codes, bank)
    new = nnls_codes(K, H, simplex=simplex, support=support).to(codes)
    dead = new.sum(dim=1) <= 0
    if bool(dead.any()):
        kept = codes if support is None else codes * support
        new = torch.where(dead[:, None], kept, new)
    return new
