"""Packed factors of a compact checkpoint: modules that their tensors are loaded into, and what they become then."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from globe.bank.coded import Coded
from globe.bank.packed_tensors import Stored, read_stored
from globe.bank.packing import grid_of
from globe.bank.rounding import LevelGrid, row_width
from globe.errors import CheckpointError
from globe.hf.packed_product import PackedMatrices, refusal

_log = logging.getLogger(__name__)

PARAMETERS = {"adapters": "adapters", "bank": "atoms", "atoms_left": "left", "atoms_right": "right"}
"""Names of the factors that can be packed, in an artefact and in a module."""


class FewBits(nn.Module):
    """Stands in a module where a factor (*rows, k) is due, under its name, until the factor is made of its tensors."""

    def __init__(self, rows: tuple[int, ...], layout: dict[str, Any]) -> None:
        super().__init__()
        self.layout = layout
        for name, (shape, dtype) in _parts(rows, layout).items():
            if name not in layout["absent"]:
                empty = torch.empty(shape, dtype=dtype)
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def packed(self, where: str) -> Stored:
        """Return the factor. Raises ArtefactError if the tensors are none of a packed factor."""
        tensors = {name: tensor.detach() for name, tensor in self.named_parameters()}
        return read_stored(tensors, self.layout, where)


def _parts(rows: tuple[int, ...], layout: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shapes and dtypes of the tensors of a factor."""
    if "coded" in layout:
        k = layout["coded"]
        return {
            "words": ((layout["bytes"],), torch.uint8),
            "ends": (rows[:1], torch.int32),
            "experts": ((*rows[:1], 2), torch.uint8),
            "rows": (rows, torch.uint8),
            "spread": ((k,), torch.uint8),
            "columns": ((k,), torch.bfloat16),
        }
    grid = grid_of(layout, "a packed factor")
    levelled = isinstance(grid, LevelGrid)
    width = (layout["bytes"],) if isinstance(grid, LevelGrid) else (*rows, row_width(grid.bits))
    columns = grid.group if isinstance(grid, LevelGrid) else len(grid.bits)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "words": (width, torch.uint8),
        "scale": ((*rows, grid.group_count), torch.bfloat16),
        "zero": ((*rows, grid.group_count), torch.uint8),
        "columns": ((columns,), torch.bfloat16),
    }
    if levelled:
        shapes["levels"] = (rows, torch.uint8)
    return shapes


def describe(packed: Stored, members: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Say what a module has to know before it sees the tensors; `members` are rows of the factor that modules hold."""
    absent = [] if isinstance(packed, Coded) else sorted({"scale", "zero", "columns"} - set(packed.tensors()))
    described = packed.layout() | {"absent": absent}
    if isinstance(packed, Coded) or isinstance(packed.grid, LevelGrid):
        described["bytes"] = [packed[list(rows)].words.numel() for rows in members]
    return described


def of_member(layouts: Mapping[str, Mapping[str, Any]], position: int) -> dict[str, dict[str, Any]]:
    """Return the layouts of packed factors as the module of one member needs them."""
    return {
        name: {**layout, "bytes": layout["bytes"][position]} if "bytes" in layout else dict(layout)
        for name, layout in layouts.items()
    }


def place(
    module: nn.Module, name: str, shape: tuple[int, ...], layout: dict[str, Any] | None, dtype: torch.dtype
) -> None:
    """Register a parameter without values, or where the factor is packed the tensors that it will be made of."""
    if layout is None:
        module.register_parameter(name, nn.Parameter(torch.empty(*shape, dtype=dtype)))
    else:
        module.add_module(name, FewBits(shape[:-1], layout))


@torch.no_grad()
def unpack(model: nn.Module, dtype: torch.dtype, *, keep: bool = False) -> None:
    """Put parameters in the place of all packed factors, rounded once to `dtype`, on the devices of their tensors.

    With `keep`, adapters that can be multiplied as integers stay such, and the log says which factors can't. Raises
    CheckpointError where tensors were left on disk, ArtefactError where they are none of a packed factor.
    """
    outcomes = Counter[str | None]()
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, FewBits):
                continue
            if any(one.device.type == "meta" for one in child.parameters()):
                raise CheckpointError(
                    f"the packed factor {path}.{name} can't stay on disk: give more memory, or patch the run with "
                    "packed=false"
                )
            packed = child.packed(f"{path}.{name}")
            delattr(module, name)
            if keep:
                reason = _refusal(path, name, packed, dtype)
                outcomes[reason] += 1
                if reason is None:
                    assert not isinstance(packed, Coded)
                    module.add_module(name, PackedMatrices(packed))
                    continue
            module.register_parameter(name, nn.Parameter(packed.values(dtype)))
    for outcome, count in outcomes.items():
        what = "stay integers in memory" if outcome is None else f"become numbers in memory: {outcome}"
        _log.log(logging.INFO if outcome is None else logging.WARNING, "%d packed factors %s", count, what)


def _refusal(path: str, name: str, packed: Stored, dtype: torch.dtype) -> str | None:
    """Return why a factor has to become numbers; None for adapters that can be multiplied as they are."""
    if name != "adapters":
        return "atoms are composed"
    if path.endswith("globe_down"):
        return "adapters of down are multiplied from the other side"
    if isinstance(packed, Coded):
        return "coded integers have no places of their own"
    return refusal(packed, dtype)
