"""Experts that stay in the checkpoint's own dtype and are normalised whenever a part of them is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map_only

from globe.precision import widen

_aten = torch.ops.aten
_MAKERS = (_aten.new_empty, _aten.new_zeros)


def z_score(expert: Float[Tensor, "p d"], mean: Tensor | None, scale: Tensor | None) -> Float[Tensor, "p d"]:
    """(expert - mean) / scale in float64; the mean is one number or (p, d), the scale one number or (p,)."""
    value = widen(expert)
    if mean is not None:
        value = value - widen(mean)
    if scale is not None:
        value = value / widen(scale if scale.dim() == 0 else scale.unsqueeze(1))
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
        kwargs = kwargs or {}
        X = args[0] if args else None
        if isinstance(X, StoredExperts):
            packet, rest = func.overloadpacket, args[1:]
            if packet is _aten.detach:
                return X
            if packet is _aten.alias:  # a slice of all experts
                return X.dense()
            if packet in _MAKERS:
                return func(X.weights.new_empty(0, dtype=X.dtype), *args[1:], **kwargs)
            if packet in (_aten.empty_like, _aten.zeros_like):
                return func(
                    X.weights, **({"dtype": X.dtype} | {k: v for k, v in kwargs.items() if v is not None})
                )
            if packet is _aten.select and rest[0] == 0:
                return X.rows([int(rest[1])])[0]
            if packet is _aten.slice and (not rest or rest[0] == 0):
                return X.rows(range(len(X))[slice(*rest[1:])])
            if packet is _aten.index and len(rest[0]) == 1:
                (index,) = rest[0]
                return X.rows((index.nonzero()[:, 0] if index.dtype == torch.bool else index).tolist())
        args, kwargs = tree_map_only(StoredExperts, StoredExperts.dense, (args, kwargs))
        return func(*args, **kwargs)

    def rows(self, rows: Sequence[int]) -> Float[Tensor, "chosen p d"]:
        """Some of the experts, normalised, in the dtype of the fit."""
        made = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype, device=self.weights.device)
        for at, row in enumerate(rows):
            member = next(i for i, stop in enumerate(self.starts[1:]) if row % len(self) < stop)
            mean = None if self.means is None else self.means[member]
            made[at] = z_score(self.weights[row], mean, None if self.scale is None else self.scale[row])
        return made

    def dense(self) -> Float[Tensor, "n p d"]:
        """All of them at once, as an ordinary tensor."""
        return self.rows(range(len(self)))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("stored experts cannot be written to: take dense() first")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StoredExperts({tuple(self.shape)}, {self.dtype}, stored as {self.weights.dtype})"


def dense(X: Float[Tensor, "n p d"]) -> Float[Tensor, "n p d"]:
    """An ordinary tensor of the same numbers: X itself unless it is stored."""
    return X.dense() if isinstance(X, StoredExperts) else X


def joined(parts: Sequence[StoredExperts]) -> StoredExperts:
    """The experts of several members, one below the other."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part))
    means = [part.means for part in parts if part.means is not None]
    scales = [part.scale for part in parts if part.scale is not None]
    return StoredExperts(
        torch.cat([part.weights for part in parts]),
        torch.cat(means) if means else None,
        torch.cat(scales) if scales else None,
        starts,
        parts[0].dtype,
    )
