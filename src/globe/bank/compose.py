"""From factors back to matrices: mixed bases M_i = phi(sum_j alpha_ij B_j), dense experts, a cache of bases."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.records import Factors
from globe.am.state import Atoms
from globe.bank.record import BankArtefact
from globe.numerics.activation import phi

CHUNK = 8
"""Experts that are composed at once when dense matrices are rebuilt."""
_WIDENED = 1 << 24
"""Numbers of a bank that are widened at once."""


def mixed_bases(
    codes: Float[Tensor, "n m"],
    bank: Float[Tensor, "m r d"] | None = None,
    *,
    atoms_left: Float[Tensor, "m r k"] | None = None,
    atoms_right: Float[Tensor, "m k d"] | None = None,
    lam: float,
    activation: str,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n r d"]:
    """Return M_i = phi_lam(sum_j alpha_ij B_j) with dense atoms B_j, or low-rank ones B_j = U_j V_j (left, right).

    Mixed and activated in float32 or wider, whatever the dtype of the factors, then rounded once to `dtype`
    (None: the dtype of the mixing). Where at most half the atoms are used, only those are read, so one expert
    with sparse codes costs its support. Give `bank` or both of `atoms_left` and `atoms_right`.
    """
    low_rank = atoms_left is not None and atoms_right is not None
    if low_rank == (bank is not None):
        raise ValueError(
            "give either dense atoms (bank) or both halves of low-rank ones (atoms_left, _right)"
        )
    used = (codes != 0).any(dim=0)
    if 2 * int(used.sum()) <= codes.shape[1]:
        codes = codes[:, used]
        bank, atoms_left, atoms_right = (
            None if part is None else part[used] for part in (bank, atoms_left, atoms_right)
        )
    wide = torch.float64 if codes.dtype == torch.float64 else torch.float32
    if bank is not None:
        Y = _mix(codes.to(wide), bank)
    else:
        assert atoms_left is not None
        assert atoms_right is not None
        Y = _mix_low_rank(codes.to(wide), atoms_left.to(wide), atoms_right.to(wide))
    M = phi(Y, lam=lam, activation=activation)
    return M if dtype is None else M.to(dtype)


def _mix(codes: Float[Tensor, "n m"], bank: Float[Tensor, "m r d"]) -> Float[Tensor, "n r d"]:
    """Return sum_j alpha_ij B_j in the dtype of the codes; a narrower bank is widened in pieces, never whole."""
    m, r, d = bank.shape
    flat = bank.reshape(m, r * d)
    if bank.dtype == codes.dtype:
        return (codes @ flat).view(-1, r, d)
    Y = torch.empty(codes.shape[0], r * d, dtype=codes.dtype, device=codes.device)
    width = max(1, _WIDENED // max(1, m))
    for start in range(0, r * d, width):
        Y[:, start : start + width] = codes @ flat[:, start : start + width].to(codes.dtype)
    return Y.view(-1, r, d)


def _mix_low_rank(
    codes: Float[Tensor, "n m"], left: Float[Tensor, "m r k"], right: Float[Tensor, "m k d"]
) -> Float[Tensor, "n r d"]:
    """Return sum_j alpha_ij U_j V_j.

    For one expert [alpha_1 U_1 .. alpha_m U_m] [V_1; ..; V_m], with no atom made dense; for more experts the
    dense atoms are made once, m r d numbers, no more than the result takes when m <= n.
    """
    m, r, k = left.shape
    if codes.shape[0] > 1:
        return _mix(codes, left @ right)
    wide_left = (codes[0].view(m, 1, 1) * left).transpose(0, 1).reshape(r, m * k)
    return (wide_left @ right.reshape(m * k, right.shape[2])).unsqueeze(0)


def factor_bases(
    factors: Factors | Atoms,
    rows: slice = slice(None),
    *,
    lam: float,
    activation: str,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "chosen r d"]:
    """Return `mixed_bases` of some rows of factors, from the halves of low-rank atoms where there are any."""
    return mixed_bases(
        factors.codes[rows],
        factors.bank if factors.left is None else None,
        atoms_left=factors.left,
        atoms_right=factors.right,
        lam=lam,
        activation=activation,
        dtype=dtype,
    )


def bases_of(
    artefact: BankArtefact, rows: Sequence[int] | slice, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "chosen r d"]:
    """Return `mixed_bases` of some rows of an artefact."""
    return mixed_bases(
        artefact.codes[rows if isinstance(rows, slice) else list(rows)],
        artefact.bank,
        atoms_left=artefact.atoms_left,
        atoms_right=artefact.atoms_right,
        lam=artefact.lam,
        activation=artefact.activation,
        dtype=dtype,
    )


def rebuild(
    artefact: BankArtefact,
    rows: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
) -> Float[Tensor, "chosen p d"]:
    """Return dense experts W_i = A_i M_i + mean of the given rows of the bank (None: all), in the artefact's device.

    Computed in float32 or wider and rounded once to `dtype` (None: the adapters' own), `chunk` experts at a
    time, so the result is the only thing of its size. Rows count through all members (`Member.start`,
    `Member.stop`).
    """
    chosen = list(range(artefact.n)) if rows is None else list(rows)
    if any(not 0 <= row < artefact.n for row in chosen):
        raise IndexError(f"rows {chosen} are not all among the bank's {artefact.n} experts")
    dtype = dtype or artefact.adapters.dtype
    experts = torch.empty(len(chosen), artefact.p, artefact.d, dtype=dtype, device=artefact.adapters.device)
    for start in range(0, len(chosen), chunk):
        part = chosen[start : start + chunk]
        M = bases_of(artefact, part)
        W = artefact.adapters[part].to(M.dtype) @ M
        if artefact.mean is not None:
            positions = [_member_position(artefact, row) for row in part]
            mean = artefact.mean[positions].to(W.dtype)
            W += mean.reshape(-1, 1, 1) if mean.dim() == 1 else mean
        experts[start : start + chunk] = W
    return experts


def _member_position(artefact: BankArtefact, row: int) -> int:
    return next(at for at, member in enumerate(artefact.members) if member.start <= row < member.stop)


class BasisCache:
    """Composed bases M_i of at most `capacity` experts; those used longest ago leave first.

    What a caller needs at once is never thrown out for more of the same: experts come in the same order call after
    call, and where more are needed than fit, dropping the oldest would leave nothing that the next call finds.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: dict[int, Tensor] = {}

    def take(self, experts: Sequence[int]) -> dict[int, Float[Tensor, "r d"]]:
        """Return the bases that are there; they count as used now, and must not be written into."""
        found = {expert: self._kept.pop(expert) for expert in experts if expert in self._kept}
        self._kept |= found  # popped and put back, so the least recently used stand first
        return found

    def make_room(self, count: int, needed: Collection[int]) -> int:
        """Throw out what is not `needed` until `count` more fit, or nothing is left, and return how many fit then."""
        for oldest in [expert for expert in self._kept if expert not in needed]:
            if len(self._kept) + count <= self.capacity:
                break
            del self._kept[oldest]
        return max(0, min(count, self.capacity - len(self._kept)))

    def keep(self, bases: dict[int, Float[Tensor, "r d"]]) -> None:
        """Put in what there is room for; before, `make_room` says how many that is."""
        assert not bases or len(self._kept) + len(bases) <= self.capacity
        self._kept |= bases

    def clear(self) -> None:
        """Forget all bases, after the factors have changed, or to give the memory back."""
        self._kept.clear()

    @property
    def experts(self) -> tuple[int, ...]:
        """Whose bases are there, least recently used first."""
        return tuple(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the bases that are there now."""
        return sum(basis.nbytes for basis in self._kept.values())
