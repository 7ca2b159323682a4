"""Closed-form starts: the truncated SVD of every expert, and the rotation (gauge) between bases."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.numerics.precision import to_float64


class WarmStart(NamedTuple):
    """X_i ~ adapters_i bases_i, the best approximation of rank r."""

    adapters: Float[Tensor, "n p r"]
    bases: Float[Tensor, "n r d"]


def truncated_svd(X: Float[Tensor, "n p d"], r: int) -> WarmStart:
    """Return A0_i = U_r S_r and B0_i = V_r^T of every expert, the minimiser of ||X_i - A0_i B0_i||_F at rank r.

    B0_i has orthonormal rows, whatever the rank of X_i. Works expert by expert (`right_basis`), so nothing
    of the size of all experts is made but the result. Raises ValueError unless 1 <= r <= min(p, d).
    """
    bases = torch.stack([right_basis(expert, r) for expert in X])
    return WarmStart(X @ bases.mT, bases)


def right_basis(X: Float[Tensor, "rows d"], r: int) -> Float[Tensor, "r d"]:
    """Return the r leading right singular vectors of X as orthonormal rows, strongest first.

    They are the eigenvectors of the smaller Gram matrix in float64, which is faster than an SVD and gives a projector
    as exact as the SVD in float64. The Gram matrix squares the condition number, so directions below 1e-8 of the
    strongest are rounding: a QR factorisation keeps the rows orthonormal there too, and completes the basis when X has
    rank below r. Signs are fixed by making each row's largest entry positive, since an activation tells a basis from
    its negative.

    Raises ValueError unless 1 <= r <= min(rows, d).
    """
    rows, d = X.shape
    if not 1 <= r <= min(rows, d):
        raise ValueError(f"r={r} is not between 1 and {min(rows, d)}, the smaller side of {rows} x {d}")
    wide = to_float64(X)
    if rows >= d:
        basis = leading_eigenvectors(wide.mT @ wide, r)
    else:
        basis = torch.linalg.qr((leading_eigenvectors(wide @ wide.mT, r) @ wide).mT).Q.mT
    return _fix_signs(basis).to(X)


def leading_eigenvectors(gram: Float[Tensor, "d d"], r: int) -> Float[Tensor, "r d"]:
    """Return the r leading eigenvectors of a symmetric matrix as orthonormal rows, strongest first, signs fixed."""
    return _fix_signs(torch.linalg.eigh(gram).eigenvectors[:, -r:].flip(1).mT)


def _fix_signs(basis: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0)


def procrustes(bases: Float[Tensor, "n r d"], target: Float[Tensor, "n r d"]) -> Float[Tensor, "n r r"]:
    """Return the orthogonal Q_i that minimises ||Q_i B_i - T_i||_F, per expert: Q = U V^T of T_i B_i^T = U S V^T.

    Where T_i B_i^T is singular the minimiser is not unique and one of them is returned. Schoenemann 1966.
    """
    U, _, Vh = torch.linalg.svd(to_float64(target) @ to_float64(bases).mT)
    return (U @ Vh).to(bases)


def align(bases: Float[Tensor, "n r d"], target: Float[Tensor, "n r d"]) -> Float[Tensor, "n r d"]:
    """Return Q_i B_i for the rotation of `procrustes`: the same row spaces in the gauge of `target`."""
    return procrustes(bases, target) @ bases
