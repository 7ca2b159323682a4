"""The bank as a module: its parameters, by name in the state dict, and what is computed from them alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from globe.hf.few_bits import PARAMETERS, place
from globe.hf.layout import BankLayout


class Bank(NamedTuple):
    """m atoms B_j of shape (r, d): dense, or products B_j = left_j right_j."""

    atoms: Float[Tensor, "m r d"] | None
    left: Float[Tensor, "m r k"] | None
    right: Float[Tensor, "m k d"] | None

    def factors(self) -> tuple[Tensor, ...]:
        """Return the atoms, or both factors of low-rank ones."""
        return tuple(one for one in self if one is not None)

    def to(self, device: torch.device) -> Bank:
        """Return the atoms on the device of a layer; nothing is copied if it is there already."""
        return Bank(*(None if one is None else one.to(device) for one in self))

    def apply_each(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t m r"]:
        """Return B_j x for every atom."""
        if self.atoms is not None:
            m, r, d = self.atoms.shape
            return F.linear(x, self.atoms.reshape(m * r, d)).view(-1, m, r)
        assert self.left is not None
        assert self.right is not None
        m, k, d = self.right.shape
        inner = F.linear(x, self.right.reshape(m * k, d)).view(-1, m, k)
        return torch.einsum("tmk,mrk->tmr", inner, self.left)


class Atoms(nn.Module):
    """Holds a bank, without values until a checkpoint or `globe.hf.swap.fill` brings them.

    Call the module to get its tensors, so that hooks which bring offloaded weights see the use.
    """

    def __init__(self, layout: BankLayout, dtype: torch.dtype) -> None:
        super().__init__()
        m, r, d, k = layout.m, layout.r, layout.d, layout.atom_rank
        shapes: dict[str, tuple[int, ...]] = {"bank": (m, r, d)}
        if k is not None:
            shapes = {"atoms_left": (m, r, k), "atoms_right": (m, k, d)}
        for name, shape in shapes.items():
            place(self, PARAMETERS[name], shape, layout.packed.get(name), dtype)

    def forward(self) -> Bank:
        held = self._parameters
        return Bank(held.get("atoms"), held.get("left"), held.get("right"))
