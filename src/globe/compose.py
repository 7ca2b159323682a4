"""From factors back to matrices: mixed bases M_i = phi(sum_j alpha_ij B_j), dense experts, cached bases."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.activation import phi
from globe.artefact_record import BankArtefact
from globe.errors import ConfigError

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
    """M_i = phi_lam(sum_j alpha_ij B_j) with dense atoms B_j, or low-rank ones B_j = U_j V_j (left, right).

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
    """sum_j alpha_ij B_j in the dtype of the codes; a narrower bank is widened in pieces, never whole."""
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
    """sum_j alpha_ij U_j V_j.

    For one expert [alpha_1 U_1 .. alpha_m U_m] [V_1; ..; V_m], with no atom made dense; for more experts the
    dense atoms are made once, m r d numbers, no more than the result takes when m <= n.
    """
    m, r, k = left.shape
    if codes.shape[0] > 1:
        return _mix(codes, left @ right)
    wide_left = (codes[0].view(m, 1, 1) * left).transpose(0, 1).reshape(r, m * k)
    return (wide_left @ right.reshape(m * k, right.shape[2])).unsqueeze(0)


def bases_of(
    artefact: BankArtefact, rows: Sequence[int] | slice, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "chosen r d"]:
    """`mixed_bases` of some rows of an artefact."""
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
    """Dense experts W_i = A_i M_i + mean of the given rows of the bank (None: all), in the artefact's device.

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
    """Composed bases M_i of the most recently used experts (least recently used go first).

    `capacity` is how many stay composed: an integer, 0 to compose at every call, or "all". Bytes are exact:
    those of the tensors' elements, without the allocator's rounding.
    """

    def __init__(
        self, artefact: BankArtefact, capacity: int | str = "all", *, dtype: torch.dtype = torch.float32
    ) -> None:
        wrong = capacity != "all" if isinstance(capacity, str) else capacity < 0
        if wrong:
            raise ConfigError(f"S_cache={capacity!r} is not possible: give an integer of at least 0, or all")
        self.artefact = artefact
        self.capacity = artefact.n if isinstance(capacity, str) else min(capacity, artefact.n)
        self.dtype = dtype
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    @torch.no_grad()
    def get(self, row: int) -> Float[Tensor, "r d"]:
        """M_i in the cache's dtype; the caller must not write into it. Raises IndexError for a row not
        there.
        """
        if not 0 <= row < self.artefact.n:
            raise IndexError(f"row {row} is not one of the bank's {self.artefact.n} experts")
        kept = self._kept.get(row)
        if kept is not None:
            self.hits += 1
            self._kept.move_to_end(row)
            return kept
        self.misses += 1
        basis = bases_of(self.artefact, [row], dtype=self.dtype)[0]
        if self.capacity > 0:
            if len(self._kept) == self.capacity:
                self._kept.popitem(last=False)
            self._kept[row] = basis
        return basis

    def clear(self) -> None:
        """Forget all bases: after the factors have changed, or to give the memory back."""
        self._kept.clear()

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows that are composed now, least recently used first."""
        return tuple(self._kept)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the bases that are composed now."""
        return sum(basis.nbytes for basis in self._kept.values())

    @property
    def full_cache_bytes(self) -> int:
        """Bytes of the bases once the cache is full."""
        return self.capacity * self.artefact.r * self.artefact.d * self.dtype.itemsize

    @property
    def factor_bytes(self) -> int:
        """Bytes of what is held besides: adapters, atoms, codes, mean."""
        return sum(tensor.nbytes for name, tensor in self.artefact.tensors().items() if name != "scale")

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense experts in the cache's dtype, for comparison."""
        return self.artefact.family_parameters * self.dtype.itemsize
