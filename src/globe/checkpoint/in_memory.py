"""Experts that are in memory already, in the place of a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from globe.checkpoint.experts import Checkpoint, Experts, choose_experts
from globe.checkpoint.location import Location
from globe.checkpoint.shapes import READABLE, ExpertShape
from globe.errors import CheckpointError

Place = tuple[int, str]
"""A layer and a family."""


class ExpertsInMemory(Checkpoint):
    """What a plan, a search for sizes and a fit ask a checkpoint for, answered from tensors.

    The tensors are not copied, so they must not change during a fit.
    """

    def __init__(
        self,
        experts: Mapping[Place, Tensor],
        *,
        model_type: str,
        parameters: int | None = None,
    ) -> None:
        """Parameters
        ----------
        experts
            The routed experts of every layer and family, on any device.
        model_type
            Architecture that the banks will say they were learned from.
        parameters
            Numbers of the whole model; None counts those of `experts`.

        Raises CheckpointError if a tensor is no stack of matrices in a floating-point dtype that GloBE reads.
        """
        for place, tensor in experts.items():
            _check(place, tensor)
        self._experts = dict(experts)
        self._parameters = parameters
        self.model_type = model_type
        self.config = {}  # nothing is known of the model around the experts
        self.num_layers = 1 + max(layer for layer, _ in experts)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self._experts}))

    @property
    def dense_only(self) -> str | None:
        return None

    @property
    def bytes_read(self) -> int:
        return 0

    @cached_property
    def total_parameters(self) -> int:
        return self._parameters or sum(tensor.numel() for tensor in self._experts.values())

    @cached_property
    def stored_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._experts.values())

    @property
    def plain_bytes(self) -> int:
        return self.stored_bytes

    def source(self) -> dict[str, str | None]:
        return {"id": "memory", "revision": None, "model_type": self.model_type}

    def shape(self, layer: int, family: str) -> ExpertShape:
        return ExpertShape(*self._of(layer, family).shape)

    def dtype(self, layer: int, family: str) -> torch.dtype:
        return self._of(layer, family).dtype

    def families(self, layer: int) -> tuple[str, ...]:
        return tuple(family for one, family in self._experts if one == layer)

    def locate(self, layer: int, family: str, expert: int) -> Location:
        if expert < 0:
            raise CheckpointError(
                "model.include_shared=true is not possible for experts in memory: set it to false"
            )
        return Location(_name(layer, family), expert, (0, self.shape(layer, family).p), False, False)

    def hash_tensors(self, names: Iterable[str]) -> str:
        wanted, digest = set(names), hashlib.sha256()
        for layer, family in sorted(self._experts):
            if _name(layer, family) in wanted:
                for expert in self._experts[layer, family]:
                    digest.update(expert.detach().contiguous().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()

    def read_experts(
        self,
        layer: int,
        family: str,
        *,
        include_shared: bool = False,
        max_experts: int | None = None,
        sample_method: str = "first_n",
        rows: slice = slice(None),
    ) -> Experts:
        experts = self._of(layer, family).detach()
        chosen = choose_experts(len(experts), max_experts, sample_method)
        if include_shared:
            self.locate(layer, family, -1)
        chosen = chosen[rows]
        whole = chosen == tuple(range(len(experts)))
        weights = experts if whole else experts[list(chosen)]
        for expert, matrix in zip(chosen, weights, strict=True):
            if not all(torch.isfinite(extreme) for extreme in matrix.aminmax()):  # NaN is both extremes
                raise CheckpointError(
                    f"expert {expert} of layer {layer} {family} holds NaN or infinite weights: repair or leave it out"
                )
        return Experts(weights, chosen, (_name(layer, family),) * len(chosen))

    def _of(self, layer: int, family: str) -> Tensor:
        found = self._experts.get((layer, family))
        if found is None:
            known = ", ".join(_name(*place) for place in sorted(self._experts))
            raise CheckpointError(
                f"{_name(layer, family)} is not among the experts in memory: choose from {known}"
            )
        return found


def _name(layer: int, family: str) -> str:
    return f"layer {layer} {family}"


def _check(place: Place, tensor: Tensor) -> None:
    what = f"the experts of {_name(*place)}"
    if tensor.dim() != 3 or tensor.numel() == 0:
        raise CheckpointError(
            f"{what} have the shape {tuple(tensor.shape)}: give n matrices of p x d as one tensor (n, p, d)"
        )
    if tensor.dtype not in READABLE:
        raise CheckpointError(
            f"{what} have the dtype {tensor.dtype}: give bfloat16, float16, float32 or float64"
        )
