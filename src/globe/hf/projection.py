"""One family of one layer's experts, multiplied factored: A_e M_e x for gate and up, M_e^T A_e^T h for down.

There are three forms. Composed: all bases M_e = phi_lam(sum_j alpha_ej B_j) are made at the first call and kept. Bank:
they are made tile by tile in every call, for the experts that got tokens. Latent, for a linear phi: every atom is
applied to the tokens once, and its results are mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from globe.bank.compose import BasisCache, mixed_bases
from globe.hf.atoms import Atoms, Bank
from globe.hf.few_bits import of_member, place
from globe.hf.layout import BankLayout, Mean, MemberLayout
from globe.hf.packed_product import PackedMatrices
from globe.hf.prepacked import can_prepack, prepack, prepacked_products
from globe.hf.products import Routing, grouped, spans_of, through_bank

READ = 8
"""Multiplications that take as long as reading one number from memory."""


class Projection(nn.Module):
    """W_e x for the experts e of one layer and gate or up, some or all of them factored, the others dense.

    W_e = A_e M_e + mean, (p, d).

    `member` None: none is factored. Parameters: `adapters` (h, p, r), `codes` (h, m), `mean` (1,) or (p, d),
    `dense` (experts - h, p, d), and the bank in `bank`, unless it is shared with others and given here.
    """

    adapters: Tensor | PackedMatrices
    codes: Tensor
    mean: Tensor
    dense: Tensor
    bank: Atoms

    def __init__(
        self,
        experts: int,
        size: tuple[int, int],
        layout: BankLayout | None,
        member: MemberLayout | None,
        *,
        bank: Atoms | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        factored = member.experts if member is not None else ()
        self.row = {expert: row for row, expert in enumerate(factored)}
        self.dense_row = {e: row for row, e in enumerate(sorted(set(range(experts)) - set(factored)))}
        self.rows = [self.row.get(expert, -1) for expert in range(experts)]
        self.dense_rows = [self.dense_row.get(expert, -1) for expert in range(experts)]
        self.size = size
        self.layout = layout
        self.cache = BasisCache(len(factored))
        """Its capacity is S_cache: how many experts' bases stay composed; it holds them where that is not all"""
        self._stack: Tensor | None = None
        self._prepacked: list[Tensor] | None = None
        self._signature: tuple[tuple[int, int], ...] = ()
        shapes: dict[str, tuple[int, ...]] = {}
        if self.dense_row:
            shapes["dense"] = (len(self.dense_row), *size)
        if layout is not None:
            shapes["adapters"] = (len(factored), size[0], layout.r)
            shapes["codes"] = (len(factored), layout.m)
            if layout.mean is not Mean.none:
                shapes["mean"] = (1,) if layout.mean is Mean.scalar else size
            if bank is None:
                self.bank = Atoms(layout, dtype)
        # a tuple hides a shared bank from the layer's state dict: it is saved once, at the root of the model
        self._shared = (bank,)
        packed = {}
        if layout is not None and member is not None:
            packed = of_member(layout.packed, layout.members.index(member))
        for name, shape in shapes.items():
            place(self, name, shape, packed.get(name), dtype)

    def forward(
        self, x: Float[Tensor, "t d"], pairs: Float[Tensor, "s d"], routing: Routing
    ) -> Float[Tensor, "s p"]:
        """Return W_e x for every pair; `pairs` is x[routing.tokens], for pairs of other devices anything."""
        bank = self.bank_here()
        if self.layout is None or bank is None:
            return grouped(pairs, self.dense, routing.ends, self.dense_rows)
        if self._latent(bank, len(x), len(pairs)):
            inner = self._through_atoms(x, bank, routing)
        else:
            inner = self._times_bases(pairs, bank, routing)
        if isinstance(self.adapters, PackedMatrices):
            out = self.adapters(inner, routing.ends, self.rows)
        else:
            out = grouped(inner, self.adapters, routing.ends, self.rows)
        if self.layout.mean is Mean.scalar:
            out = out + self._held(routing, (x.sum(-1, keepdim=True) * self.mean)[routing.tokens])
        elif self.layout.mean is Mean.matrix:
            out = out + self._held(routing, F.linear(x, self.mean)[routing.tokens])
        return out + grouped(pairs, self.dense, routing.ends, self.dense_rows) if self.dense_row else out

    def bank_here(self) -> Bank | None:
        """Return the atoms, this projection's own or those it shares, on its device; None if nothing is factored."""
        if self.layout is None:
            return None
        atoms = self._shared[0] or self.bank
        return atoms().to(self.codes.device)

    def _held(self, routing: Routing, shift: Float[Tensor, "s q"]) -> Float[Tensor, "s q"]:
        """Return the shift of pairs whose experts are factored, and zeros for the others."""
        held = torch.tensor([row >= 0 for row in [*self.rows, -1]], device=shift.device)
        return torch.where(held[routing.experts][:, None], shift, 0)

    def _latent(self, bank: Bank, tokens: int, pairs: int) -> bool:
        """Return whether every atom times the tokens costs less than the products with bases.

        Only a linear phi allows it: M_e x = sum_j alpha_ej (B_j x). In units of r d numbers, atoms take m to read and m
        multiplications a token. The bases take one to read for each expert that is hit, or with the bank m for all
        and m multiplications for each, and one multiplication a pair. The number of experts hit is estimated.
        """
        assert self.layout is not None
        if not (self.layout.lam == 0.0 or self.layout.activation == "identity"):
            return False
        m, experts = self.layout.m, len(self.rows)
        hit = experts * pairs // max(1, experts + pairs)
        kept = self.cache.capacity >= len(self.row) and not self._differentiable(bank)
        bases = READ * hit if kept else READ * m + m * hit
        return READ * m + tokens * m <= bases + pairs

    def _through_atoms(self, x: Float[Tensor, "t d"], bank: Bank, routing: Routing) -> Float[Tensor, "s r"]:
        """Compute the latent form: mix the products B_j x of the token of every pair."""
        codes = self.codes.new_zeros(len(self.rows) + 1, self.codes.shape[1])
        codes = codes.index_copy(0, torch.tensor(list(self.row), device=codes.device), self.codes)
        each = bank.apply_each(x)[routing.tokens]
        return torch.bmm(codes[routing.experts].to(each.dtype)[:, None], each)[:, 0]

    def _times_bases(
        self, x: Float[Tensor, "s a"], bank: Bank, routing: Routing, *, transposed: bool = False
    ) -> Float[Tensor, "s b"]:
        """Multiply pairs by the bases of their experts, or by the transposed ones; zeros where an expert is dense."""
        assert self.layout is not None
        rows, found = self.rows, None
        keeping = self.cache.capacity > 0 and not self._differentiable(bank)
        if keeping and self.cache.capacity >= len(self.row):
            if can_prepack(x, self.codes):
                return prepacked_products(x, self._compose_prepacked(bank, transposed), routing.ends, rows)
            _compose_once(self)
            assert self._stack is not None
            return grouped(x, self._stack, routing.ends, rows, transposed=transposed)
        if keeping and not torch.compiler.is_compiling():
            hit = [span.row for span in spans_of(routing.ends, rows)]
            if some := self._from_cache(hit, bank):
                held = list(some)
                places = {row: at for at, row in enumerate(held)}
                found = grouped(
                    x,
                    torch.stack([some[row] for row in held]),
                    routing.ends,
                    [places.get(row, -1) for row in rows],
                    transposed=transposed,
                )
                rows = [-1 if row in some else row for row in rows]
        out = through_bank(
            x,
            self.codes,
            bank.factors(),
            routing.ends,
            rows,
            lam=self.layout.lam,
            activation=self.layout.activation,
            transposed=transposed,
        )
        return out if found is None else out + found

    def _differentiable(self, bank: Bank) -> bool:
        """Return whether bases must be composed anew: kept ones would stop the gradients of their factors."""
        return torch.is_grad_enabled() and any(one.requires_grad for one in (self.codes, *bank.factors()))

    def compose(self) -> None:
        """Compose all bases, in float32 before they are rounded, unless those of the same factors are there."""
        bank = self.bank_here()
        assert bank is not None
        self._drop_stale(bank)
        if self._stack is None:
            with torch.inference_mode(False):
                out = self.codes.new_empty(
                    len(self.row), bank.factors()[0].shape[1], bank.factors()[-1].shape[2]
                )
            for row in range(len(out)):
                out[row] = self._compose([row], bank)[0]
            self._stack = out

    def _compose_prepacked(self, bank: Bank, transposed: bool) -> list[Tensor]:
        """Return what `compose` makes, or its transposes, prepacked; a projection always asks for the same of both."""
        self._drop_stale(bank)
        if self._prepacked is None:
            rows = range(len(self.row))
            bases = (
                self._stack if self._stack is not None else (self._compose([row], bank)[0] for row in rows)
            )
            self._prepacked = [prepack(one.mT if transposed else one) for one in bases]
            self._stack = None
        return self._prepacked

    def _from_cache(self, rows: Sequence[int], bank: Bank) -> dict[int, Float[Tensor, "r d"]]:
        """Return the bases of as many of the rows that a call needs as the cache has or has room for."""
        self._drop_stale(bank)
        found = self.cache.take(rows)
        absent = [row for row in rows if row not in found]
        new = absent[: self.cache.make_room(len(absent), set(rows))]
        if new:
            made = {row: self._compose([row], bank)[0] for row in new}
            self.cache.keep(made)
            found |= made
        return found

    def _compose(self, rows: Sequence[int], bank: Bank) -> Float[Tensor, "h r d"]:
        """Return bases to keep, which are ordinary tensors, whatever mode the call is in."""
        assert self.layout is not None
        no_autocast = torch.autocast(self.codes.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), no_autocast:
            return mixed_bases(
                self.codes[list(rows)],
                bank.atoms,
                atoms_left=bank.left,
                atoms_right=bank.right,
                lam=self.layout.lam,
                activation=self.layout.activation,
                dtype=self.codes.dtype,
            )

    def _drop_stale(self, bank: Bank) -> None:
        """Forget bases of other values: an optimiser step or a loaded state changes the version."""
        factors = (self.codes, *bank.factors())
        signature = tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in factors)
        if signature != self._signature:
            self.clear_cache()
            self._signature = signature

    @torch.no_grad()
    def rebuild(self) -> Float[Tensor, "e p d"]:
        """Return all experts as dense matrices, computed one by one in float32 and rounded once."""
        example = self.codes if self.row else self.dense
        out = torch.empty(
            len(self.row) + len(self.dense_row), *self.size, dtype=example.dtype, device=example.device
        )
        for expert, row in self.dense_row.items():
            out[expert] = self.dense[row]
        bank = self.bank_here()
        for expert, row in self.row.items():
            assert bank is not None
            assert self.layout is not None
            weight = self.adapters[row].float() @ self._compose([row], bank)[0].float()
            out[expert] = weight if self.layout.mean is Mean.none else weight + self.mean.float()
        return out

    def clear_cache(self) -> None:
        """Forget all bases, after the factors have changed, or to give the memory back."""
        self.cache.clear()
        self._stack = self._prepacked = None
        self._signature = ()

    @property
    def composed_bytes(self) -> int:
        """Bytes of the bases that are composed now."""
        kept = ([] if self._stack is None else [self._stack]) + (self._prepacked or [])
        return self.cache.nbytes + sum(one.nbytes for one in kept)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the bases out of a copy, which composes them anew: prepacked ones can't be copied."""
        return self.__dict__ | {"_stack": None, "_prepacked": None, "_signature": ()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projection:
        """Move to another device or dtype, and forget what was composed before."""
        self.clear_cache()
        return super()._apply(fn, recurse)


class OutputProjection(Projection):
    """W_e^T h for the experts e of one layer and down, of which the bank holds W_e (p, d) as it does gate and up.

    With W_e = A_e M_e + mean that is M_e^T (A_e^T h) + mean^T h.
    """

    def forward(
        self, x: Float[Tensor, "s p"], pairs: Float[Tensor, "s p"], routing: Routing
    ) -> Float[Tensor, "s d"]:
        """Return W_e^T h for every pair; x and `pairs` are the rows h of the pairs both."""
        bank = self.bank_here()
        assert self.layout is not None
        assert bank is not None
        assert isinstance(self.adapters, Tensor)
        inner = grouped(x, self.adapters, routing.ends, self.rows, transposed=True)
        out = self._times_bases(inner, bank, routing, transposed=True)
        if self.layout.mean is Mean.scalar:
            out = out + self._held(routing, x.sum(-1, keepdim=True) * self.mean)
        elif self.layout.mean is Mean.matrix:
            out = out + self._held(routing, x @ self.mean)
        if self.dense_row:
            out = out + grouped(x, self.dense, routing.ends, self.dense_rows, transposed=True)
        return out


@torch.compiler.assume_constant_result
def _compose_once(projection: Projection) -> bool:
    """Compose all bases; `torch.compile` does so while it traces and finds them as tensors."""
    projection.compose()
    return True
