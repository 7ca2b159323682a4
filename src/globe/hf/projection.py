"""One family of one layer's experts, multiplied factored: A_e M_e x for gate and up, M_e^T A_e^T h for down.

M_e = phi_lam(sum_j alpha_ej B_j) is composed for the experts that got tokens, kept for as many as the cache
may hold, and never made for all experts at once unless the cache is asked to hold them all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from globe.bank.compose import BasisCache, mixed_bases
from globe.hf.atoms import Atoms, Bank
from globe.hf.few_bits import of_member, place
from globe.hf.layout import BankLayout, Mean, MemberLayout
from globe.numerics.activation import phi

COMPOSED_AT_ONCE = 8
"""Bases composed together on the way through the experts; bounds memory when nothing is cached."""


class Group(NamedTuple):
    """Rows [start, stop) of the sorted tokens go to one expert."""

    expert: int
    start: int
    stop: int


class Projection(nn.Module):
    """W_e x for the experts e of one layer and gate or up, some or all of them factored, the others dense.

    W_e = A_e M_e + mean, (p, d).

    `member` None: none is factored. Parameters: `adapters` (h, p, r), `codes` (h, m), `mean` (1,) or (p, d),
    `dense` (experts - h, p, d), and the bank in `bank`, unless it is shared with others and given here.
    """

    adapters: Tensor
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
        self.size = size
        self.layout = layout
        self.cache = BasisCache(len(factored))
        """Its capacity is S_cache: how many experts' bases stay composed"""
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
        self,
        x: Float[Tensor, "t d"],
        rows: Sequence[Float[Tensor, "_ d"]],
        tokens: Int[Tensor, " s"],
        groups: Sequence[Group],
    ) -> Float[Tensor, "s p"]:
        """W_e x for every pair: `tokens` is sorted by expert as `groups` says, `rows` are x[tokens] per group."""
        bank = self.bank_here()
        each = bank.apply_each(x) if bank is not None and self._through_atoms(len(x), groups) else None
        shift = self._shift(x)
        hit = {group.expert for group in groups}
        if bank is not None and each is None and self.cache.capacity == 0:
            bank = bank.formed(len(hit))
        parts = []
        for first in range(0, len(groups), COMPOSED_AT_ONCE):
            chunk = groups[first : first + COMPOSED_AT_ONCE]
            wanted = [group.expert for group in chunk if group.expert in self.row]
            bases = self._bases(wanted, bank, hit) if bank is not None and each is None else {}
            for (expert, start, stop), own in zip(chunk, rows[first:], strict=False):
                if expert in self.dense_row:
                    parts.append(F.linear(own, self.dense[self.dense_row[expert]]))
                    continue
                row = self.row[expert]
                if each is None:
                    inner = F.linear(own, bases[expert])
                else:
                    inner = torch.einsum("m,smr->sr", self.codes[row], each[tokens[start:stop]])
                out = F.linear(inner, self.adapters[row])
                parts.append(out if shift is None else out + shift[tokens[start:stop]])
        return torch.cat(parts)

    def bank_here(self) -> Bank | None:
        """The atoms, this projection's own or those it shares, on its device; None if nothing is factored."""
        if self.layout is None:
            return None
        atoms = self._shared[0] or self.bank
        return atoms().to(self.codes.device)

    def _through_atoms(self, tokens: int, groups: Sequence[Group]) -> bool:
        """Return whether every atom times the tokens costs less than the bases of the experts that are hit.

        Only a linear phi allows it: M_e x = sum_j alpha_ej (B_j x). In units of r d multiplications the atoms take m a
        token, the products with bases one a pair of token and expert, and composing takes m an expert.
        """
        assert self.layout is not None
        m, pairs = self.layout.m, groups[-1].stop
        linear = self.layout.lam == 0.0 or self.layout.activation == "identity"
        composing = m * len(groups) if self.cache.capacity == 0 else 0
        return linear and tokens * m < composing + pairs

    def _shift(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t q"] | None:
        """What the stored mean adds: (t, p), or (t, 1) for a scalar mean, a multiple of the sum of x."""
        if self.layout is None or self.layout.mean is Mean.none:
            return None
        if self.layout.mean is Mean.scalar:
            return x.sum(-1, keepdim=True) * self.mean
        return F.linear(x, self.mean)

    def _bases(
        self, wanted: Sequence[int], bank: Bank, hit: Collection[int]
    ) -> dict[int, Float[Tensor, "r d"]]:
        """M_e of factored experts, from the cache or composed together; `hit` are all those of the call."""
        if not wanted:
            return {}
        factors = [self.codes, *(one for one in bank if one is not None)]
        differentiable = torch.is_grad_enabled() and any(one.requires_grad for one in factors)
        if differentiable or self.cache.capacity == 0:  # a stored basis would stop the gradients
            assert self.layout is not None
            mixed = bank.mix(self.codes[[self.row[expert] for expert in wanted]])
            activated = phi(mixed, lam=self.layout.lam, activation=self.layout.activation)
            return dict(zip(wanted, activated.unbind(), strict=True))
        self._drop_stale(factors)
        found = self.cache.take(wanted)
        absent = [expert for expert in wanted if expert not in found]
        return found | self._compose_and_keep(absent, bank, hit) if absent else found

    def _compose_and_keep(
        self, experts: Sequence[int], bank: Bank, hit: Collection[int]
    ) -> dict[int, Float[Tensor, "r d"]]:
        """Bases of experts that the cache lacks; as many go into it as it has room for."""
        kept = experts[: self.cache.make_room(len(experts), hit)]
        no_autocast = torch.autocast(self.codes.device.type, enabled=False)
        # ordinary tensors, whatever mode the call is in, and no views of the block: they outlive it
        with torch.inference_mode(False), torch.no_grad(), no_autocast:
            found = dict(zip(experts, self._compose(experts, bank).unbind(), strict=True))
            found |= {expert: found[expert].clone() for expert in kept}
        self.cache.keep({expert: found[expert] for expert in kept})
        return found

    def _compose(self, experts: Sequence[int], bank: Bank) -> Float[Tensor, "h r d"]:
        assert self.layout is not None
        return mixed_bases(
            self.codes[[self.row[expert] for expert in experts]],
            bank.atoms,
            atoms_left=bank.left,
            atoms_right=bank.right,
            lam=self.layout.lam,
            activation=self.layout.activation,
            dtype=self.codes.dtype,
        )

    def _drop_stale(self, factors: Sequence[Tensor]) -> None:
        """Forget bases composed from other values: an optimiser step or a loaded state changes the version."""
        signature = tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in factors)
        if signature != self._signature:
            self.clear_cache()
            self._signature = signature

    @torch.no_grad()
    def rebuild(self) -> Float[Tensor, "e p d"]:
        """All experts as dense matrices, computed one by one in float32 and rounded once."""
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
            weight = self.adapters[row].float() @ self._compose([expert], bank)[0].float()
            out[expert] = weight if self.layout.mean is Mean.none else weight + self.mean.float()
        return out

    def clear_cache(self) -> None:
        self.cache.clear()
        self._signature = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projection:
        """Every move to another device or dtype ends here; what was composed before is of no more use."""
        self.clear_cache()
        return super()._apply(fn, recurse)


class OutputProjection(Projection):
    """W_e^T h for the experts e of one layer and down, of which the bank holds W_e (p, d) as it does gate and up.

    With W_e = A_e M_e + mean that is M_e^T (A_e^T h) + mean^T h.
    """

    def forward(
        self,
        x: Float[Tensor, "s p"],
        rows: Sequence[Float[Tensor, "_ p"]],
        tokens: Int[Tensor, " s"],
        groups: Sequence[Group],
    ) -> Float[Tensor, "s d"]:
        """W_e^T h for every pair: x are the rows h of all pairs, sorted by expert, `rows` the same per group."""
        bank = self.bank_here()
        hit = {group.expert for group in groups}
        if bank is not None and self.cache.capacity == 0:
            bank = bank.formed(len(hit))
        parts = []
        for first in range(0, len(groups), COMPOSED_AT_ONCE):
            chunk = groups[first : first + COMPOSED_AT_ONCE]
            wanted = [group.expert for group in chunk if group.expert in self.row]
            bases = self._bases(wanted, bank, hit) if bank is not None else {}
            for group, own in zip(chunk, rows[first:], strict=False):
                if group.expert in self.dense_row:
                    parts.append(own @ self.dense[self.dense_row[group.expert]])
                else:
                    inner = own @ self.adapters[self.row[group.expert]]
                    parts.append(self._add_mean(inner @ bases[group.expert], own))
        return torch.cat(parts)

    def _add_mean(self, out: Float[Tensor, "t d"], h: Float[Tensor, "t p"]) -> Float[Tensor, "t d"]:
        if self.layout is None or self.layout.mean is Mean.none:
            return out
        if self.layout.mean is Mean.scalar:
            return out + h.sum(-1, keepdim=True) * self.mean
        return out + h @ self.mean
