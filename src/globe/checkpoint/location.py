"""Which tensors of a checkpoint are experts, and where in them one matrix is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from globe.checkpoint.architecture import FAMILIES, PREFIXES, Architecture, Layout, Slot, with_prefix
from globe.checkpoint.tensorfile import Index
from globe.errors import CheckpointError

_NUMBER = "[0-9]{1,6}"
"""Of a layer or expert. Python would take digits of every script, and be slow with thousands of them."""


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
        """Return the matrix as a view of the stored tensor: copying into it changes just that part."""
        part = stored[self.index]
        return part.T if self.transposed else part


def locate_matrix(slot: Slot, name: str, shape: tuple[int, ...], expert: int | None) -> Location:
    """Return the matrix of one family in a stored tensor of this shape; `expert` as in `Location`."""
    total = shape[-1 if slot.transposed else -2]
    if slot.half is None:
        rows = (0, total)
    elif slot.interleaved:
        rows = (slot.half, total)
    else:
        rows = (slot.half * total // 2, (slot.half + 1) * total // 2)
    return Location(name, expert, rows, slot.transposed, slot.interleaved)


def named_as(architecture: Architecture, names: Sequence[str]) -> Architecture:
    """Return the architecture with its tensors called as in `names`, where a writer put another prefix before the
    layers.

    Raises CheckpointError if experts stand there under two prefixes.
    """
    fitting: dict[str, Architecture] = {}
    for candidate in (architecture, *(with_prefix(architecture, prefix) for prefix in PREFIXES)):
        for matched in list(_by_layer(candidate, names).values())[:1]:
            fitting.setdefault(next(iter(matched)), candidate)
    if len(fitting) > 1:
        first, second = list(fitting)[:2]
        raise CheckpointError(
            f"experts have names of two kinds, such as {first} and {second}: remove one of the two, or rename it"
        )
    return next(iter(fitting.values()), architecture)


def find_layouts(architecture: Architecture, names: Iterable[str]) -> dict[int, Layout]:
    """Return the layout of every layer of which some expert tensor exists.

    Raises CheckpointError if a layer has tensors of two layouts, since nothing tells which of them is the model.
    """
    found: dict[int, Layout] = {}
    for layer, matched in sorted(_by_layer(architecture, names).items()):
        fitting = set.intersection(*matched.values())
        if not fitting:
            first = next(iter(matched))
            second = next(name for name, ranks in matched.items() if not ranks & matched[first])
            raise CheckpointError(
                f"the experts of layer {layer} are there twice, such as {first} and {second}: remove one of the two"
            )
        found[layer] = architecture.layouts[min(fitting)]
    return found


def _by_layer(architecture: Architecture, names: Iterable[str]) -> dict[int, dict[str, set[int]]]:
    """Return layer -> name of an expert tensor -> the layouts, by number, that have such a tensor."""
    patterns = [_pattern(layout) for layout in architecture.layouts]
    found: dict[int, dict[str, set[int]]] = {}
    for name in names:
        for rank, pattern in enumerate(patterns):
            if match := pattern.fullmatch(name):
                layer = int(next(group for group in match.groups() if group is not None))
                found.setdefault(layer, {}).setdefault(name, set()).add(rank)
    return found


def _pattern(layout: Layout) -> re.Pattern[str]:
    templates = {slot.template for family in FAMILIES if (slot := layout.slot(family)) is not None}
    joined = "|".join(re.escape(template) for template in sorted(templates))
    return re.compile(joined.replace(r"\{layer\}", f"({_NUMBER})").replace(r"\{expert\}", _NUMBER))


def count_layers(names: Iterable[str]) -> int:
    """Return one more than the highest layer number in any name, for configs that do not say how many there are."""
    numbers = (re.search(rf"\blayers\.({_NUMBER})\.", name) for name in names)
    return max((int(match[1]) for match in numbers if match), default=-1) + 1
