"""Packed factors of a compact checkpoint: modules that their tensors are loaded into, and what they become then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from globe.bank.packing import Packed, grid_of, packed_bytes, read_packed
from globe.errors import CheckpointError

PARAMETERS = {"adapters": "adapters", "bank": "atoms", "atoms_left": "left", "atoms_right": "right"}
"""Names of the factors that can be packed, in an artefact and in a module."""


class FewBits(nn.Module):
    """Stands in a module where a factor (*rows, k) is due, under its name, until the factor is made of its tensors."""

    def __init__(self, rows: tuple[int, ...], layout: dict[str, Any]) -> None:
        super().__init__()
        self.layout = layout
        grid = grid_of(layout, "a packed factor")
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "words": ((*rows, packed_bytes(grid)), torch.uint8),
            "scale": ((*rows, grid.group_count), torch.bfloat16),
            "zero": ((*rows, grid.group_count), torch.uint8),
            "columns": ((len(grid.bits),), torch.bfloat16),
        }
        for name, (shape, dtype) in shapes.items():
            if name not in layout["absent"]:
                empty = torch.empty(shape, dtype=dtype)
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def values(self, dtype: torch.dtype, where: str) -> Tensor:
        """The factor, rounded once to `dtype`. Raises ArtefactError if the tensors are none of a packed factor."""
        tensors = {name: tensor.detach() for name, tensor in self.named_parameters()}
        return read_packed(tensors, self.layout, where).values(dtype)


def describe(packed: Packed) -> dict[str, Any]:
    """What a module has to know before it sees the tensors."""
    absent = sorted({"words", "scale", "zero", "columns"} - set(packed.tensors()))
    return packed.layout() | {"absent": absent}


def place(
    module: nn.Module, name: str, shape: tuple[int, ...], layout: dict[str, Any] | None, dtype: torch.dtype
) -> None:
    """Register a parameter without values, or where the factor is packed the tensors that it will be made of."""
    if layout is None:
        module.register_parameter(name, nn.Parameter(torch.empty(*shape, dtype=dtype)))
    else:
        module.add_module(name, FewBits(shape[:-1], layout))


@torch.no_grad()
def unpack(model: nn.Module, dtype: torch.dtype) -> None:
    """Put parameters in the place of all packed factors, rounded once to `dtype`, on the devices of their tensors.

    Raises CheckpointError where tensors were left on disk, ArtefactError where they are none of a packed factor.
    """
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, FewBits):
                continue
            if any(one.device.type == "meta" for one in child.parameters()):
                raise CheckpointError(
                    f"the packed factor {path}.{name} can't stay on disk: give more memory, or patch the run with "
                    "packed=false"
                )
            values = child.values(dtype, f"{path}.{name}")
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(values))
