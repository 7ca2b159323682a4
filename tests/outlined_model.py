"""A model that has layers and shapes but no weights, for tests of plans and budgets."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    n: int
    p: int
    d: int


class Model:
    """24 layers of 16 experts; layer 7 has 12, layer 9 has rows of another length."""

    num_layers = 24
    moe_layers = tuple(range(24))

    def shape(self, layer: int, family: str) -> Shape:
        return Shape(12 if layer == 7 else 16, 44, 72 if layer == 9 else 60)
