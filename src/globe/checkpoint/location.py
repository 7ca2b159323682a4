"""Which tensors of a checkpoint are experts, and where in them one matrix is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from globe.checkpoint.architecture import FAMILIES, Architecture, Layout, Slot
from globe.checkpoint.tensorfile import Index


@dataclass(frozen=True, slots=True)
class Location:
    """Where one (p, d) matrix is in the files: `view(stored)` of the tensor named `tensor`."""

    tensor: str
    expert: int | None
    """Index on the first axis of a tensor that holds all experts; None if the tensor is this expert's own."""
    rows: tuple[int, int]
    """Half-open range of the stored rows (of the last axis if `transposed`) that are this family's."""
    transposed: bool
    interleaved: bool
    """Every second row of the range is this family's, beginning with the first."""

    @property
    def index(self) -> Index:
        """What picks the matrix out of the stored tensor, still transposed if that is."""
        rows = slice(*self.rows, 2 if self.interleaved else 1)
        matrix = (slice(None), rows) if self.transposed else (rows, slice(None))
        return matrix if self.expert is None else (self.expert, *matrix)

    def view(self, stored: Float[Tensor, "*stored"]) -> Float[Tensor, "p d"]:
        """The matrix as a view of the stored tensor: copying into it changes just that part."""
        part = stored[self.index]
        return part.T if self.transposed else part


def locate_matrix(slot: Slot, name: str, shape: tuple[int, ...], expert: int | None) -> Location:
    """The matrix of one family in a stored tensor of this shape; `expert` as in `Location`."""
    total = shape[-1 if slot.transposed else -2]
    if slot.half is None:
        rows = (0, total)
    elif slot.interleaved:
        rows = (slot.half, total)
    else:
        rows = (slot.half * total // 2, (slot.half + 1) * total // 2)
    return Location(name, expert, rows, slot.transposed, slot.interleaved)


def find_layouts(architecture: Architecture, names: Iterable[str]) -> dict[int, Layout]:
    """The layout of every layer of which some expert tensor exists; the first one listed if there are two."""
    patterns = []
    for layout in architecture.layouts:
        templates = {slot.template for family in FAMILIES if (slot := layout.slot(family)) is not None}
        joined = "|".join(re.escape(template) for template in sorted(templates))
        joined = joined.replace(r"\{layer\}", r"(\d+)").replace(r"\{expert\}", r"\d+")
        patterns.append((layout, re.compile(joined)))
    found: dict[int, int] = {}
    for name in names:
        for rank, (_, pattern) in enumerate(patterns):
            if match := pattern.fullmatch(name):
                layer = int(next(group for group in match.groups() if group is not None))
                found[layer] = min(rank, found.get(layer, rank))
                break
    return {layer: patterns[rank][0] for layer, rank in sorted(found.items())}


def count_layers(names: Iterable[str]) -> int:
    """One more than the highest layer number in any name, for configs that do not say how many there are."""
    numbers = (re.search(r"\blayers\.(\d+)\.", name) for name in names)
    return max((int(match[1]) for match in numbers if match), default=-1) + 1
