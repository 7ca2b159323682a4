"""What is said of one way to store a quantised matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from globe.checkpoint.tensorfile import TensorEntry

Parts = Mapping[str, Tensor]
"""Tensors of one matrix by their suffix."""
Entries = Mapping[str, TensorEntry]
"""Their headers."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What `quantization_config` says of one matrix, where its tensors do not say it themselves."""

    bits: int = 4
    """Bits of a packed integer."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None where the shapes tell."""
    group: int | None = None
    """Inputs that share a scale; None for all of them."""
    zero_offset: int = 0
    """What is added to a packed zero point: GPTQ's first format stores one less."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way to store a matrix: its tensors, and the functions that turn them into numbers.

    `main` is the tensor that holds the numbers. It has `axes` axes, or one more that counts experts. Of such a stack
    both functions get the tensors of one expert at a time.
    """

    main: str
    """Suffix of the main tensor; an empty one is the name of the matrix itself."""
    dtypes: tuple[torch.dtype, ...]
    """Dtypes of the main tensor by which it is known."""
    needs: tuple[str, ...]
    """Suffixes of the tensors that must be beside it."""
    shape: Callable[[Entries, Settings], tuple[int, int]]
    """Return rows and columns of the matrix from headers. Raises ValueError saying what does not fit."""
    values: Callable[[Parts, Settings], Tensor]
    """Return the matrix in float32. Raises ValueError saying what does not fit."""
    takes: tuple[str, ...] = ()
    """Suffixes of tensors that may be beside it."""
    replaced_by: str = ""
    """What stands in the place of `main` in the name of the matrix."""
    axes: int = 2

    def matches(self, name: str, dtype: torch.dtype) -> bool:
        """Return whether this is the main tensor of a matrix in this form."""
        return name.endswith(self.main) and dtype in self.dtypes
