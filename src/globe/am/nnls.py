"""Non-negative codes by least squares, and the logits that give them."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from globe.errors import FitError
from globe.numerics.precision import to_float64

_GRAM_FLOOR = 1e-13
"""Eigenvalues of a Gram matrix below this share of the largest are rounding and are left out."""
_SIMPLEX_WEIGHT = 1e4
"""Weight of the row that holds the sum at one, beside the atoms and targets; the sum is then met to 1e-8."""


def logits_from_codes(
    codes: Float[Tensor, "n m"], *, code_map: str, temperature: float = 1.0, margin: float = 1e-4
) -> tuple[Float[Tensor, "n m"], Float[Tensor, " n"]]:
    """Return logits z and gains s with s_i * map(z_i / T) = codes_i: the exact inverse of the code map.

    s_i = sum_j codes_ij and, for p = codes / s, z = 2 T sqrt(p) for entmax15 and z = T p for sparsemax
    (Peters, Niculae, Martins 2019, threshold zero). Zero codes stand `margin` T below the threshold, so
    that rounding does not let them in. A row of zeros has gain 0 and equal logits.
    """
    gains = codes.sum(dim=1)
    p = codes / gains.clamp_min(torch.finfo(codes.dtype).tiny).unsqueeze(1)
    match code_map:
        case "entmax15":
            z = 2 * p.sqrt()
        case "sparsemax":
            z = p
        case _:
            raise ValueError(f"codes.map={code_map!r} is not one of entmax15, sparsemax")
    return temperature * torch.where(p > 0, z, torch.full_like(z, -margin)), gains


def nnls_codes(
    G: Float[Tensor, "*each m m"],
    H: Float[Tensor, "n m"],
    *,
    simplex: bool = False,
    support: Bool[Tensor, "n m"] | None = None,
) -> Float[Tensor, "n m"]:
    """Minimise 1/2 alpha_i^T G alpha_i - H_i^T alpha_i over alpha_i >= 0, per expert.

    G is the Gram matrix of the atoms, one for all experts (m, m) or one each (n, m, m); H_ij = <atom_j,
    target_i>. `simplex` adds sum_j alpha_ij = 1; `support` allows only some atoms of each expert.

    Atoms are scaled to unit norm, which the answer does not depend on; then scipy's active-set NNLS (Lawson
    and Hanson 1974) on a square root R of the Gram matrix, R^T R = G, in float64 on the CPU: Cholesky, and
    where G is singular its eigenvectors without those below 1e-13 of the largest. The simplex is a row of
    weight 1e4.

    An atom of norm zero gets code 0 (without `simplex`). Raises ValueError when G is neither shape or a row
    of `support` is empty, FitError when the active-set method does not end.
    """
    n, m = H.shape
    if G.shape not in ((m, m), (n, m, m)):
        raise ValueError(f"a Gram matrix {tuple(G.shape)} does not fit right-hand sides {tuple(H.shape)}")
    if support is not None and not bool(support.any(dim=1).all()):
        raise ValueError("an expert has an empty support: allow it at least one atom")
    grams, rights = to_float64(G).cpu().numpy(), to_float64(H).cpu().numpy()
    allowed = None if support is None else support.cpu().numpy()
    codes = torch.zeros(n, m, dtype=torch.float64)
    rows = codes.numpy()
    shared = _Root(grams, simplex) if grams.ndim == 2 and allowed is None else None
    for i in range(n):
        chosen = slice(None) if allowed is None else allowed[i].nonzero()[0]
        gram = grams if grams.ndim == 2 else grams[i]
        root = shared or _Root(gram if allowed is None else gram[chosen][:, chosen], simplex)
        rows[i, chosen] = root.solve(rights[i, chosen])
    return codes.to(H)


class _Root:
    """A square root of one Gram matrix with unit diagonal, from which NNLS problems are solved."""

    def __init__(self, gram: np.ndarray, simplex: bool) -> None:
        diagonal = gram.diagonal()
        self.norms = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        self.simplex = simplex
        gram = gram / np.outer(self.norms, self.norms)
        values, vectors = np.linalg.eigh(gram)
        if values[0] > _GRAM_FLOOR * values[-1]:
            self.root = np.linalg.cholesky(gram).T
            self.inverse = np.linalg.inv(self.root).T
        else:
            kept = values > _GRAM_FLOOR * values[-1]
            width = np.sqrt(values[kept])[:, None]
            self.root, self.inverse = width * vectors[:, kept].T, vectors[:, kept].T / width

    def solve(self, right: np.ndarray) -> np.ndarray:
        from scipy.optimize import nnls

        right = right / self.norms
        root, target = self.root, self.inverse @ right
        if self.simplex:
            atom = np.sqrt(np.mean(self.norms**2))
            weight = _SIMPLEX_WEIGHT * max(atom, np.sqrt(atom * np.abs(right).max()))
            root = np.vstack([root, weight / self.norms])
            target = np.append(target, weight)
        try:
            codes = nnls(root, target, maxiter=30 * max(len(right), 10))[0] / self.norms
        except RuntimeError as error:
            raise FitError(
                f"the non-negative codes did not settle ({error}): raise codes.l1 or lower bank.m"
            ) from error
        return codes / codes.sum() if self.simplex else codes
