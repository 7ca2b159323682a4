"""A learned bank once it is exported: its tensors, whose experts they stand for, and what makes it valid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from globe.bank.packed_tensors import Stored
from globe.errors import ArtefactError

TENSOR_NAMES = ("bank", "atoms_left", "atoms_right", "codes", "adapters", "mean", "scale")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATIONS = ("identity", "silu", "tanh", "gelu")


@dataclass(frozen=True, slots=True)
class Member:
    """Rows [start, stop) of a bank's n experts are the routed experts `experts` of one layer and family."""

    layer: int
    family: str
    start: int
    stop: int
    experts: tuple[int, ...]
    """routed expert number of each row; -1 is the shared expert"""


@dataclass(frozen=True, slots=True, eq=False)
class BankArtefact:
    """A learned bank: W_i = A_i phi_lam(sum_j alpha_ij B_j) + mean, for the n experts of all members.

    The scale of the z-score is already folded into `adapters`. Atoms are dense (`bank`) or low-rank,
    B_j = atoms_left_j atoms_right_j, never both. Compare two artefacts by their tensors or their file hashes.
    """

    members: tuple[Member, ...]
    codes: Tensor
    """alpha (n, m), not negative; shapes are checked by `validate`, since a file may hold anything"""
    adapters: Tensor
    """A (n, p, r)"""
    activation: str
    """identity, silu, tanh or gelu"""
    lam: float
    """homotopy of the activation at the end of the fit: 0 linear, 1 the activation itself"""
    bank: Tensor | None = None
    """B (m, r, d), dense atoms"""
    atoms_left: Tensor | None = None
    """U (m, r, k) of low-rank atoms"""
    atoms_right: Tensor | None = None
    """V (m, k, d) of low-rank atoms"""
    mean: Tensor | None = None
    """what to add to every expert of a member: nothing, a number per member (members,), or (members, p, d)"""
    scale: Tensor | None = None
    """the scale that was divided out: (members,), (n,) or (n, p); provenance only, not applied again"""
    source: dict[str, Any] | None = None
    """id, revision, model_type and tensor hash of the checkpoint"""
    config: dict[str, Any] | None = None
    seed: int = 0
    metrics: dict[str, Any] | None = None
    packed: Mapping[str, Stored] = field(default_factory=dict)
    """factors that are stored with few bits, by the names of the tensors, which are what they are read back as"""

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def p(self) -> int:
        return self.adapters.shape[1]

    @property
    def d(self) -> int:
        right = self.bank if self.bank is not None else self.atoms_right
        assert right is not None
        return right.shape[2]

    @property
    def m(self) -> int:
        return self.codes.shape[1]

    @property
    def r(self) -> int:
        return self.adapters.shape[2]

    @property
    def atom_rank(self) -> int | None:
        """k of low-rank atoms; None for dense ones."""
        return None if self.atoms_left is None else self.atoms_left.shape[2]

    @property
    def kept_parameters(self) -> int:
        """Numbers an engine must hold: adapters, atoms, codes, and the stored mean (p x d or one number)."""
        held = (self.adapters, self.codes, self.bank, self.atoms_left, self.atoms_right, self.mean)
        return sum(tensor.numel() for tensor in held if tensor is not None)

    @property
    def family_parameters(self) -> int:
        """Numbers of the dense experts the artefact stands for: n p d."""
        return self.n * self.p * self.d

    @property
    def nbytes(self) -> int:
        """Bytes that an engine must hold, and read: of `kept_parameters`, packed where they are."""
        held = ("adapters", "codes", "bank", "atoms_left", "atoms_right", "mean")
        found = {name: tensor for name, tensor in self.tensors().items() if name in held}
        return sum((self.packed.get(name) or tensor).nbytes for name, tensor in found.items())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by the names they have in the file."""
        found = {name: getattr(self, name) for name in TENSOR_NAMES}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def validate(artefact: BankArtefact, where: str = "the artefact") -> None:
    """Check names, shapes, dtypes, finiteness, codes >= 0 and that the members tile the n rows.

    Raises ArtefactError with one sentence that names `where` and the first thing wrong.
    """
    for name, tensor in artefact.tensors().items():
        require(tensor.dtype in _DTYPES, where, f"tensor {name!r} has dtype {tensor.dtype}, not a float")
    _validate_shapes(artefact, where)
    _validate_members(artefact, where)
    for name, tensor in artefact.tensors().items():
        # expert by expert: a mask for all of a large bank at once would cost half as much as the bank
        finite = all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(1 << 24))
        require(finite, where, f"tensor {name!r} holds NaN or infinity")
    for name, one in artefact.packed.items():
        shape = tuple(getattr(getattr(artefact, name, None), "shape", ()))
        require(one.shape == shape, where, f"the packed {name!r} has the shape {one.shape}, not {shape}")
    require(bool((artefact.codes >= 0).all()), where, "tensor 'codes' holds negative numbers")
    require(artefact.activation in ACTIVATIONS, where, f"activation {artefact.activation!r} is unknown")
    require(0.0 <= artefact.lam <= 1.0, where, f"lam={artefact.lam!r} is not between 0 and 1")


def require(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise ArtefactError(f"{where} can't be used: {problem}; export the run again")


def _validate_shapes(artefact: BankArtefact, where: str) -> None:
    low_rank = artefact.atoms_left is not None and artefact.atoms_right is not None
    half = (artefact.atoms_left is None) != (artefact.atoms_right is None)
    require(
        not half and low_rank != (artefact.bank is not None),
        where,
        "it needs either 'bank' or both 'atoms_left' and 'atoms_right'",
    )
    three = ("adapters", "bank", "atoms_left", "atoms_right")
    for name, tensor in artefact.tensors().items():
        axes = 3 if name in three else 2 if name == "codes" else None
        require(
            axes is None or tensor.dim() == axes, where, f"tensor {name!r} has shape {tuple(tensor.shape)}"
        )
        require(tensor.numel() > 0, where, f"tensor {name!r} is empty")
    n, p, d, m, r = artefact.n, artefact.p, artefact.d, artefact.m, artefact.r
    k, count = artefact.atom_rank, len(artefact.members)
    allowed: dict[str, tuple[tuple[int | None, ...], ...]] = {
        "adapters": ((n, p, r),),
        "codes": ((n, m),),
        "bank": ((m, r, d),),
        "atoms_left": ((m, r, k),),
        "atoms_right": ((m, k, d),),
        "mean": ((count,), (count, p, d)),
        "scale": ((count,), (n,), (n, p)),
    }
    for name, tensor in artefact.tensors().items():
        shape = tuple(tensor.shape)
        expected = " or ".join(str(choice) for choice in allowed[name])
        require(shape in allowed[name], where, f"tensor {name!r} has shape {shape} where {expected} is due")


def _validate_members(artefact: BankArtefact, where: str) -> None:
    row = 0
    seen = set()
    for member in artefact.members:
        name = f"member layer {member.layer} {member.family}"
        require((member.layer, member.family) not in seen, where, f"{name} stands there twice")
        require(
            member.start == row and member.stop > row,
            where,
            f"{name} does not follow the row {row} before it",
        )
        require(
            len(set(member.experts)) == len(member.experts) == member.stop - member.start,
            where,
            f"{name} does not name one expert for each of its rows",
        )
        seen.add((member.layer, member.family))
        row = member.stop
    require(row == artefact.n, where, f"its members cover {row} experts and its codes {artefact.n}")
