"""Experts that stay in the checkpoint's own dtype and are normalised whenever a part of them is read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map_only

from globe.numerics.precision import to_float64

_NO_WRITING = "stored experts cannot be written to: take dense() first"


def z_score(expert: Float[Tensor, "p d"], mean: Tensor | None, scale: Tensor | None) -> Float[Tensor, "p d"]:
    """Return (expert - mean) / scale in float64; the mean is one number or (p, d), the scale one number or (p,)."""
    value = to_float64(expert)
    if mean is not None:
        value = value - to_float64(mean)
    if scale is not None:
        value = value / to_float64(scale if scale.dim() == 0 else scale.unsqueeze(1))
    return value


class StoredExperts(Tensor):
    """Normalised experts (n, p, d) as a tensor whose numbers are made when it is indexed along the experts.

    Half the memory where a checkpoint is in bfloat16 and the fit in float32, with the same bits: `X[part]` is what
    `normalise` would have stored, made anew. Any other operation on it as a whole works on `dense()`, with the memory
    of that. It cannot be written to.
    """

    weights: Tensor
    """(n, p, d) as in the checkpoint"""
    means: Tensor | None
    """nothing, one number per member (members,), or one mean expert per member (members, p, d)"""
    scale: Tensor | None
    """nothing, one per expert (n,), or one per row (n, p)"""
    starts: tuple[int, ...]
    """first row of each member, and n at the end"""

    @staticmethod
    def __new__(
        cls,
        weights: Tensor,
        means: Tensor | None,
        scale: Tensor | None,
        starts: Sequence[int],
        dtype: torch.dtype,
    ) -> StoredExperts:
        made = Tensor._make_wrapper_subclass(cls, weights.shape, dtype=dtype, device=weights.device)
        assert isinstance(made, StoredExperts)
        made.weights, made.means, made.scale, made.starts = weights, means, scale, tuple(starts)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what has no answer of its own below on the dense tensor."""
        if func._schema.is_mutable:
            raise TypeError(_NO_WRITING)
        args, kwargs = tree_map_only(StoredExperts, StoredExperts.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, tuple):
            return self[index[0]][index[1:]] if isinstance(index[0], int) else self[index[0]][:, *index[1:]]
        if isinstance(index, int):
            return self.rows([range(len(self))[index]])[0]
        if isinstance(index, slice):
            return self.rows(range(len(self))[index])
        return self.rows(torch.arange(len(self), device=getattr(index, "device", None))[index].tolist())

    def new_empty(self, *size: Any, **options: Any) -> Tensor:
        return self.weights.new_empty(*size, **({"dtype": self.dtype} | options))

    def new_zeros(self, *size: Any, **options: Any) -> Tensor:
        return self.weights.new_zeros(*size, **({"dtype": self.dtype} | options))

    def rows(self, rows: Sequence[int]) -> Float[Tensor, "chosen p d"]:
        """Return some of the experts, normalised, in the dtype of the fit."""
        made = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype, device=self.weights.device)
        for at, row in enumerate(rows):
            mean = None if self.means is None else self.means[bisect_right(self.starts, row) - 1]
            made[at] = z_score(self.weights[row], mean, None if self.scale is None else self.scale[row])
        return made

    def dense(self) -> Float[Tensor, "n p d"]:
        """Return all of them at once, as an ordinary tensor."""
        return self.rows(range(len(self)))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(_NO_WRITING)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StoredExperts({tuple(self.shape)}, {self.dtype}, stored as {self.weights.dtype})"
