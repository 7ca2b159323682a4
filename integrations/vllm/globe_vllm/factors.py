"""The factors of one family of one layer, and their products: W_e = A_e phi_lam(sum_j alpha_ej B_j) + mean, (p, d)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from globe_vllm.packed import Packed

COMPOSED_AT_ONCE = 8
"""Bases composed together in the bank form; bounds the memory of a call."""
SPLIT_AXIS = {"dense": 1, "adapters": 1}
"""Axis of p, which tensor parallelism shares out; a stored mean matrix has it first, all else is on every process."""


def phi(Y: Tensor, lam: float, activation: str) -> Tensor:
    """(1 - lam) Y + lam act(Y). Raises ValueError for an activation that banks do not have."""
    if activation == "identity" or lam == 0.0:
        return Y
    match activation:
        case "silu":
            bent = F.silu(Y)
        case "tanh":
            bent = torch.tanh(Y)
        case "gelu":
            bent = F.gelu(Y)
        case _:
            raise ValueError(
                f"globe: a bank with the activation {activation!r} can't be served: update globe-vllm"
            )
    return bent if lam == 1.0 else (1 - lam) * Y + lam * bent


class Bank:
    """The atoms of a bank, which several layers and families may share: dense, or products left_j right_j."""

    def __init__(self, layout: Mapping[str, Any], dtype: torch.dtype) -> None:
        m, r, d, k = layout["m"], layout["r"], layout["d"], layout["atom_rank"]
        shapes = {"atoms": (m, r, d)} if k is None else {"left": (m, r, k), "right": (m, k, d)}
        self.held = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        self.absent = set(self.held)
        packed = layout.get("packed") or {}
        files = {"bank": "atoms", "atoms_left": "left", "atoms_right": "right"}
        self.packed = {files[name]: Packed(one) for name, one in packed.items() if name in files}

    def load(self, name: str, value: Tensor) -> None:
        name, value = unpacked(self.packed, name, value)
        if value is not None:
            copy_into(self.held, self.absent, name, value)

    def mix(self, codes: Tensor, several: bool) -> Tensor:
        """sum_j codes_hj B_j for codes (h, m): (h, r, d). `several`: form low-rank atoms once for many experts."""
        if "atoms" in self.held or several:
            atoms = self.atoms()
            return (codes @ atoms.reshape(len(atoms), -1)).view(-1, *atoms.shape[1:])
        left, right = self.held["left"], self.held["right"]
        m, r, k = left.shape
        weighted = (codes[:, :, None, None] * left).permute(0, 2, 1, 3).reshape(-1, m * k)
        return (weighted @ right.reshape(m * k, -1)).view(len(codes), r, -1)

    def atoms(self) -> Tensor:
        return self.held["atoms"] if "atoms" in self.held else self.held["left"] @ self.held["right"]


class Factors:
    """One family of one layer: factors of the experts that a bank serves, dense matrices of the others.

    `rank` and `p` are this process's share under tensor parallelism; files hold all of p.
    """

    def __init__(
        self,
        experts: int,
        p: int,
        d: int,
        layout: Mapping[str, Any] | None,
        member: Mapping[str, Any] | None,
        bank: Bank | None,
        *,
        rank: int,
        dtype: torch.dtype,
    ) -> None:
        served = [] if member is None else member["experts"]
        self.row = {expert: row for row, expert in enumerate(served)}
        self.dense_row = {e: row for row, e in enumerate(sorted(set(range(experts)) - set(served)))}
        self.bank, self.rank, self.bases = bank, rank, None
        self.lam, self.activation = (
            (0.0, "identity") if layout is None else (layout["lam"], layout["activation"])
        )
        shapes: dict[str, tuple[int, ...]] = {}
        if self.dense_row:
            shapes["dense"] = (len(self.dense_row), p, d)
        if layout is not None:
            shapes["adapters"] = (len(served), p, layout["r"])
            shapes["codes"] = (len(served), layout["m"])
            if layout["mean"] != "none":
                shapes["mean"] = (1,) if layout["mean"] == "scalar" else (p, d)
        self.held = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        self.absent = set(self.held)
        packed = (layout or {}).get("packed") or {}
        self.packed = {name: Packed(one) for name, one in packed.items() if name == "adapters"}

    def load(self, name: str, value: Tensor) -> None:
        """Copy a tensor of the file, or this process's share of it. Raises ValueError if it does not fit."""
        if name.startswith("bank.") and self.bank is not None:
            self.bank.load(name.removeprefix("bank."), value)
            return
        name, value = unpacked(self.packed, name, value)
        if value is None:
            return
        axis = SPLIT_AXIS.get(name, 0 if name == "mean" and value.dim() == 2 else None)
        if axis is not None and name in self.held:
            share = self.held[name].shape[axis]
            value = value.narrow(axis, self.rank * share, share)
        copy_into(self.held, self.absent, name, value)

    def missing(self) -> list[str]:
        """Names of factors that no file gave."""
        own = sorted(self.absent)
        return own if self.bank is None else own + [f"bank.{name}" for name in sorted(self.bank.absent)]

    def keep_composed(self) -> None:
        """Compose the bases of all experts once, (h, r, d); codes are dropped, the bank by whoever holds it."""
        if self.row:
            assert self.bank is not None
            rows = range(len(self.row))
            self.bases = torch.cat([self.compose([row], several=len(self.row) > 2) for row in rows])
            del self.held["codes"]
        self.bank = None

    def compose(self, rows: Sequence[int], *, several: bool) -> Tensor:
        """phi(sum_j alpha_j B_j) of these experts, (h, r, d), in the dtype of the factors."""
        assert self.bank is not None
        return phi(self.bank.mix(self.held["codes"][list(rows)], several), self.lam, self.activation)

    def nbytes(self) -> int:
        """Bytes that this family holds, but for a bank."""
        bases = 0 if self.bases is None else self.bases.nbytes
        return bases + sum(tensor.nbytes for tensor in self.held.values())

    def project(self, rows: Sequence[Tensor], experts: Sequence[int], *, output: bool) -> Tensor:
        """W_e x for gate and up, W_e^T h for down (`output`), over rows grouped by expert; one tensor of all rows."""
        out = []
        for first in range(0, len(experts), COMPOSED_AT_ONCE):
            chunk = experts[first : first + COMPOSED_AT_ONCE]
            wanted = [self.row[expert] for expert in chunk if expert in self.row]
            bases = self._bases(wanted, len(experts))
            for x, expert in zip(rows[first:], chunk, strict=False):
                if expert in self.dense_row:
                    dense = self.held["dense"][self.dense_row[expert]]
                    out.append(x @ dense if output else F.linear(x, dense))
                    continue
                row = self.row[expert]
                adapter, basis = self.held["adapters"][row], bases[row]
                y = x @ adapter @ basis if output else F.linear(F.linear(x, basis), adapter)
                out.append(self._add_mean(y, x, output))
        return torch.cat(out)

    def _bases(self, wanted: Sequence[int], hit: int) -> Any:
        if self.bases is not None or not wanted:
            return self.bases
        return dict(zip(wanted, self.compose(wanted, several=hit > 2), strict=True))

    def _add_mean(self, y: Tensor, x: Tensor, output: bool) -> Tensor:
        mean = self.held.get("mean")
        if mean is None:
            return y
        if mean.dim() == 1:
            return y + x.sum(-1, keepdim=True) * mean
        return y + (x @ mean if output else F.linear(x, mean))


def unpacked(packed: Mapping[str, Packed], name: str, value: Tensor) -> tuple[str, Tensor | None]:
    """Name and numbers of a factor; None while parts of a packed one are still to come."""
    factor, _, part = name.partition(".")
    return (factor, packed[factor].take(part, value)) if factor in packed else (name, value)


def copy_into(held: dict[str, Tensor], absent: set[str], name: str, value: Tensor) -> None:
    """Copy a tensor of the file to its place. Raises ValueError if there is none, or one of another shape."""
    target = held.get(name)
    if target is None or target.shape != value.shape:
        expected = "no such factor" if target is None else f"{list(target.shape)}"
        raise ValueError(
            f"globe: the checkpoint holds {name} of {list(value.shape)} where its config.json says {expected}: "
            "patch the run again"
        )
    target.copy_(value)
    absent.discard(name)
