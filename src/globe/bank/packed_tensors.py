"""Packed factors among the tensors of a file: `adapters.words`, `adapters.scale`, .. in the place of `adapters`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from globe.bank.coded import Coded, read_coded
from globe.bank.packing import Packed, read_packed
from globe.errors import ArtefactError

PACKABLE = ("adapters", "bank", "atoms_left", "atoms_right")
"""Factors that can be packed; codes are few and stay numbers."""
Stored = Packed | Coded
_EMPTY = 64
"""Numbers of a packed factor for each byte that it takes, at most. Rows of mostly empty columns are refused, since a
small file could ask for any amount of memory with them."""


def flatten(packed: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Return the tensors of packed factors by the names they have in a file."""
    return {
        f"{name}.{part}": tensor for name, one in packed.items() for part, tensor in one.tensors().items()
    }


def has_coded(packed: Mapping[str, Stored]) -> bool:
    """Return whether some factor is of coded integers."""
    return any(isinstance(one, Coded) for one in packed.values())


def layouts(packed: Mapping[str, Stored]) -> dict[str, Any]:
    """Return what these tensors mean, in plain values."""
    return {name: one.layout() for name, one in packed.items()}


def gather(
    tensors: Mapping[str, Tensor], described: Any, where: str
) -> tuple[dict[str, Tensor], dict[str, Stored]]:
    """Return tensors of a file as plain ones and packed factors: the inverse of `flatten` and `layouts`.

    Raises ArtefactError with a sentence that begins with `where` if a packed factor is not what is `described`.
    """
    if not isinstance(described, Mapping) or not set(described) <= set(PACKABLE):
        raise ArtefactError(f"{where} can't be used: it describes other packed factors than {PACKABLE}")
    plain = dict(tensors)
    packed: dict[str, Stored] = {}
    for name, layout in described.items():
        parts = {
            one.removeprefix(f"{name}."): plain.pop(one) for one in list(plain) if one.startswith(f"{name}.")
        }
        one = packed[name] = read_stored(parts, layout, f"{where}, tensor {name!r},")
        if math.prod(one.shape) > _EMPTY * one.nbytes or len(one.shape) != 3:
            raise ArtefactError(f"{where} can't be used: the packed {name!r} has the shape {one.shape}")
    return plain, packed


def read_stored(tensors: Mapping[str, Tensor], layout: Any, where: str) -> Stored:
    """Return a factor of packed or coded integers. Raises ArtefactError where the tensors are none."""
    if isinstance(layout, Mapping) and "coded" in layout:
        return read_coded(tensors, layout, where)
    return read_packed(tensors, layout, where)


def dequantised(packed: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the factors as numbers, rounded once to `dtype`."""
    return {name: one.values(dtype) for name, one in packed.items()}
