"""What a compact checkpoint says about its banks: the `quantization_config` of its `config.json`.

Enough to build every module with the right shapes before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from globe.bank.file import BankArtefact
from globe.bank.packing import grid_of
from globe.bank.record import ACTIVATIONS
from globe.bank.rounding import LevelGrid
from globe.errors import ArtefactError
from globe.files import parse_record, plain_record
from globe.hf.few_bits import PARAMETERS, describe

VERSION_KEY = "globe_version"
VERSION = 1
PACKED_VERSION = 2
"""Version of checkpoints with packed factors, which programs that know only version 1 refuse."""
CODED_VERSION = 3
"""The same of coded adapters."""
QUANT_METHOD = "globe"
"""The name under which transformers registers compact checkpoints."""
_LARGEST = 1 << 20


class Mean(StrEnum):
    none = "none"
    scalar = "scalar"
    matrix = "matrix"


@dataclass(frozen=True, slots=True)
class MemberLayout:
    """The experts of one layer and family that a bank stands for; a row of codes each, in this order."""

    layer: int
    family: str
    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BankLayout:
    """Sizes and activation of one bank, and the layers and families it serves."""

    m: int
    r: int
    p: int
    d: int
    atom_rank: int | None
    activation: str
    lam: float
    mean: Mean
    members: tuple[MemberLayout, ...]
    packed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """what the tensors of packed factors mean, by the names of the factors in an artefact: `few_bits.describe`"""

    @property
    def shared(self) -> bool:
        """Several members use the bank, so it is kept at the root of the model rather than in a layer."""
        return len(self.members) > 1


def layout_of(artefact: BankArtefact) -> BankLayout:
    """Return the layout of a bank. The shared expert (number -1), if the bank has it, is left out: it stays dense."""
    mean = artefact.mean
    routed = [
        [one.start + row for row, expert in enumerate(one.experts) if expert >= 0] for one in artefact.members
    ]
    return BankLayout(
        m=artefact.m,
        r=artefact.r,
        p=artefact.p,
        d=artefact.d,
        atom_rank=artefact.atom_rank,
        activation=artefact.activation,
        lam=artefact.lam,
        mean=Mean.none if mean is None else Mean.scalar if mean.dim() == 1 else Mean.matrix,
        members=tuple(
            MemberLayout(member.layer, member.family, tuple(one for one in member.experts if one >= 0))
            for member in artefact.members
        ),
        packed={name: describe(one, routed) for name, one in artefact.packed.items()},
    )


def unpacked(layouts: Sequence[BankLayout]) -> tuple[BankLayout, ...]:
    """Return the same layouts with all factors as plain numbers."""
    return tuple(replace(layout, packed={}) for layout in layouts)


def version_of(layouts: Sequence[BankLayout]) -> int:
    """Return the version of a checkpoint with these layouts."""
    if any("coded" in one for layout in layouts for one in layout.packed.values()):
        return CODED_VERSION
    return PACKED_VERSION if any(layout.packed for layout in layouts) else VERSION


def to_json(layouts: Sequence[BankLayout]) -> list[dict[str, Any]]:
    """Return plain values for `config.json`."""
    records = [plain_record(layout) for layout in layouts]
    if version_of(layouts) == VERSION:
        for record in records:
            del record["packed"]
    return records


def from_json(banks: Any, version: Any) -> tuple[BankLayout, ...]:
    """Return the layouts of a compact checkpoint. Raises ArtefactError for another version or a malformed record."""
    if type(version) is not int or version not in (VERSION, PACKED_VERSION, CODED_VERSION):
        raise ArtefactError(
            f"quantization_config.{VERSION_KEY}={version!r} where {VERSION} to {CODED_VERSION} are read: patch the "
            "run again"
        )
    try:
        if not isinstance(banks, list | tuple):
            raise ValueError("it is no list")
        layouts = tuple(parse_record(BankLayout, bank) for bank in banks)
        for layout in layouts:
            _require_possible(layout)
        return layouts
    except (ValueError, ArtefactError) as error:
        raise ArtefactError(
            f"quantization_config.banks of config.json is malformed ({error}): patch the run again"
        ) from error


def _require_possible(layout: BankLayout) -> None:
    """Raise ValueError for sizes, names or numbers with which no module could be built."""
    sizes = (layout.m, layout.r, layout.p, layout.d, layout.atom_rank if layout.atom_rank is not None else 1)
    if not all(1 <= size < _LARGEST for size in sizes):
        raise ValueError("a size is not between 1 and 2^20")
    if layout.activation not in ACTIVATIONS or not 0.0 <= layout.lam <= 1.0 or not layout.members:
        raise ValueError("activation, lam or members are not possible")
    for name, described in layout.packed.items():
        if name not in PARAMETERS or not isinstance(described.get("absent"), list):
            raise ValueError(f"there is no packed {name!r}")
        width = {"adapters": layout.r, "atoms_left": layout.atom_rank}.get(name, layout.d)
        if "coded" in described:
            columns, streams = described["coded"], True
        else:
            grid = grid_of(described, name)
            streams = isinstance(grid, LevelGrid)
            columns = grid.group if isinstance(grid, LevelGrid) else len(grid.bits)
        if columns != width:
            raise ValueError(f"the packed {name!r} has not the {width} columns of its bank")
        if streams:
            _require_bytes(described.get("bytes"), name, layout)
    for member in layout.members:
        experts = member.experts
        if member.layer < 0 or len(set(experts)) < len(experts) or min(experts, default=0) < 0:
            raise ValueError(f"the experts of layer {member.layer} {member.family} are not possible")


def _require_bytes(each: Any, name: str, layout: BankLayout) -> None:
    """Raise ValueError unless every member has a number of bytes that its rows could take."""
    most = [len(member.experts) * (2 * layout.p * layout.r + 256) for member in layout.members]
    known = isinstance(each, list | tuple) and len(each) == len(most)
    if name != "adapters" or not known or not all(type(one) is int for one in each):
        raise ValueError(f"the packed {name!r} does not say how many bytes its members take")
    if not all(0 <= one <= bound for one, bound in zip(each, most, strict=True)):
        raise ValueError(f"the packed {name!r} can't take {each} bytes")
