"""Expert matrices out of a Hugging Face checkpoint, layer by layer, without building the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from globe.checkpoint.architecture import (
    FAMILIES,
    Architecture,
    Layout,
    Slot,
    known_model_types,
    load_architecture,
)
from globe.checkpoint.hub import Source, resolve
from globe.checkpoint.location import Location, count_layers, find_layouts, locate_matrix, named_as
from globe.checkpoint.model_config import (
    is_quantised,
    read_config,
    refuse_compact,
    refuse_other_weights,
    size_of,
)
from globe.checkpoint.quantised.reader import DequantisedReader, open_quantised, plain_config
from globe.checkpoint.shapes import ExpertShape, matrix_shape, routed_shape
from globe.checkpoint.shards import ShardReader
from globe.errors import CheckpointError

SHARED = -1
"""Expert number of the always-on shared expert."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The matrices read: `weights[i]` is routed expert `indices[i]` (-1: the shared one) from `names[i]`."""

    weights: Float[Tensor, "n p d"]
    indices: tuple[int, ...]
    names: tuple[str, ...]
    """Tensor that holds each expert; the same name n times where one tensor holds them all."""


class Checkpoint:
    """An opened checkpoint: what it is, and its expert matrices. Opening reads config and headers only."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.folder = source.folder
        self.config: dict[str, Any] = read_config(self.folder)
        self.model_type = str(self.config["model_type"])
        refuse_compact(self.config, self.folder)
        refuse_other_weights(self.config, self.folder)
        self.stored = self.reader = ShardReader(self.folder, source.headers)
        """The tensors as they are in the files."""
        if self.model_type not in known_model_types() and not self._mentions_experts():
            raise CheckpointError(self._no_experts())
        self.reader = open_quantised(self.stored, self.config)
        """The tensors as they are read: those of a quantised checkpoint as the plain one has them."""
        self.quantisation: str | None = None
        """`quant_method` of the files; `config` is that of the plain checkpoint."""
        if isinstance(self.reader, DequantisedReader):
            self.quantisation = self.reader.method
            self.config = plain_config(self.config)
        names = self.reader.names
        self.architecture: Architecture = named_as(load_architecture(self.model_type), names)
        found = find_layouts(self.architecture, names)
        self.num_layers = self._count_layers()
        # Layers past the last are multi-token-prediction heads (61 of DeepSeek-V3), not the model proper.
        self._layouts = {layer: found[layer] for layer in sorted(found) if layer < self.num_layers}
        if not self._layouts:
            raise CheckpointError(self._no_experts())
        self._shapes: dict[tuple[int, str], ExpertShape] = {}

    def _count_layers(self) -> int:
        promised, held = (
            size_of(self.config, self.architecture.config.layers),
            count_layers(self.reader.names),
        )
        if promised is not None and held and promised > held:
            raise CheckpointError(
                f"{self.folder} has the tensors of {held} layers and config.json promises {promised}: correct "
                "config.json, or save or download the checkpoint again"
            )
        return held if promised is None else promised

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have routed experts, ascending."""
        return tuple(self._layouts)

    @property
    def dense_only(self) -> str | None:
        """A sentence that says why the model can't run with factors in the place of its experts; None if it can."""
        reason = self.architecture.dense_only
        return (
            reason
            and f"{self.model_type} can't run with factors ({reason}), so that a patched model is dense"
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return self.reader.bytes_read

    @cached_property
    def total_parameters(self) -> int:
        """Floating-point numbers stored in the whole checkpoint; a tied tensor counts once. Headers only."""
        entries = [self.reader.entry(name) for name in self.reader.names]
        return sum(one.nbytes // one.dtype.itemsize for one in entries if one.dtype.is_floating_point)

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files of the checkpoint, by its headers."""
        return self.stored.stored_bytes(self.stored.names)

    @cached_property
    def plain_bytes(self) -> int:
        """Bytes of all tensors as they are read, which are more than `stored_bytes` if the checkpoint is quantised."""
        return sum(self.reader.entry(name).nbytes for name in self.reader.names)

    def source(self) -> dict[str, str | None]:
        """Return the provenance: id (hub id or folder), revision (commit, hub only), model_type."""
        return {"id": self._source.id, "revision": self._source.revision, "model_type": self.model_type}

    def hash_tensors(self, names: Iterable[str]) -> str:
        """Return the SHA-256 (hexadecimal) of the stored bytes of these tensors, each once, in name order; streams."""
        return self.reader.hash(names)

    def shape(self, layer: int, family: str) -> ExpertShape:
        """Return the sizes of the routed experts, from headers. Raises CheckpointError as `read_experts` does."""
        if (layer, family) not in self._shapes:
            self._slot(layer, family)
            self._shapes[layer, family] = routed_shape(
                self.reader, self._layout(layer), family, layer, self.config, self.architecture.config
            )
        return self._shapes[layer, family]

    def dtype(self, layer: int, family: str) -> torch.dtype:
        """Return the dtype in which the routed experts of a layer and family are stored."""
        return self.reader.dtype(self.locate(layer, family, 0).tensor)

    def families(self, layer: int) -> tuple[str, ...]:
        """Return which of gate, up and down the experts of a layer have: some models have no gate."""
        return tuple(family for family in FAMILIES if self._layout(layer).slot(family) is not None)

    def locate(self, layer: int, family: str, expert: int) -> Location:
        """Return where the matrix of a routed expert, or of the shared one (-1), is in the files."""
        if expert == SHARED:
            slot = self._shared_slot(layer, family)
            name = slot.name(layer, 0)
            return locate_matrix(slot, name, self.reader.shape(name), None)
        n = self.shape(layer, family).n
        if not 0 <= expert < n:
            raise CheckpointError(
                f"expert {expert} is out of range for layer {layer}: give one of 0 to {n - 1}"
            )
        slot = self._slot(layer, family)
        name = slot.name(layer, expert)
        if slot.stacked:
            p = self.shape(layer, family).p
            return Location(name, None, (expert * p, (expert + 1) * p), transposed=False, interleaved=False)
        return locate_matrix(slot, name, self.reader.shape(name), expert if slot.fused else None)

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
        """Return the expert matrices of one layer and family ("up", "gate" or "down"), in the checkpoint's dtype.

        An expert computes down^T (act(gate x) * up x): all three families come as (I, H), whatever way they are
        stored, so down comes transposed. Of n routed experts at most `max_experts` are taken, the first ones or evenly
        spaced from the first to the last; the shared one, if asked for, comes last. `rows` is the part of
        all these that is wanted, none perhaps. Only the bytes of these matrices are read (both gate and up
        where they alternate row by row). Raises CheckpointError for a layer out of range or without
        experts, a family the model lacks, a shared expert of another size, quantised weights, shapes or
        expert counts that contradict each other or the config, and weights that are not finite.
        """
        shape = self.shape(layer, family)
        indices = choose_experts(shape.n, max_experts, sample_method)
        places = [self.locate(layer, family, expert) for expert in indices]
        if include_shared:
            self._check_shared(shape, layer, family)
            places.append(self.locate(layer, family, SHARED))
            indices = (*indices, SHARED)
        dtype = self.reader.dtype(places[0].tensor)
        places, indices = places[rows], indices[rows]
        weights = torch.empty(len(places), shape.p, shape.d, dtype=dtype)
        for target, expert, place in zip(weights, indices, places, strict=True):
            part = self.reader.read(place.tensor, place.index)
            target.copy_(part.T if place.transposed else part)
            if not all(torch.isfinite(extreme) for extreme in target.aminmax()):  # NaN is both extremes
                raise CheckpointError(
                    f"{place.tensor} in {self.folder} holds NaN or infinite weights (layer {layer}, "
                    f"{family}, expert {expert}): save or download it again, or leave this layer out"
                )
        return Experts(weights, indices, tuple(place.tensor for place in places))

    def _slot(self, layer: int, family: str) -> Slot:
        slot = self._layout(layer).slot(family)
        if slot is None:
            raise CheckpointError(
                f"family={family!r}: the experts of {self.model_type} have no {family} matrix: choose another"
            )
        return slot

    def _layout(self, layer: int) -> Layout:
        if not 0 <= layer < self.num_layers:
            raise CheckpointError(
                f"layer={layer} is out of range for {self._source.id}: give one of 0 to {self.num_layers - 1}"
            )
        if layer not in self._layouts:
            raise CheckpointError(
                f"layer={layer} of {self._source.id} has no routed experts: choose from "
                f"{_ranges(self.moe_layers)}"
            )
        return self._layouts[layer]

    def _shared_slot(self, layer: int, family: str) -> Slot:
        self._layout(layer)
        slot = None if self.architecture.shared is None else self.architecture.shared.slot(family)
        if slot is None or slot.name(layer, 0) not in self.reader:
            raise CheckpointError(
                f"model.include_shared=true, but layer {layer} of {self._source.id} has no shared expert: "
                "set it to false"
            )
        return slot

    def _check_shared(self, shape: ExpertShape, layer: int, family: str) -> None:
        slot = self._shared_slot(layer, family)
        p, d = matrix_shape(self.reader, slot, slot.name(layer, 0), axes=2)
        if (p, d) != (shape.p, shape.d):
            raise CheckpointError(
                f"model.include_shared=true, but in layer {layer} the shared {family} matrix is {p} x {d} "
                f"and the routed ones are {shape.p} x {shape.d}: set it to false"
            )

    def _mentions_experts(self) -> bool:
        return any("expert" in name or "moe" in name for name in self.reader.names)

    def _no_experts(self) -> str:
        if not self._mentions_experts():
            return (
                f"{self.folder} (model_type={self.model_type!r}) has no routed experts to compress: "
                "give the checkpoint of a Mixture-of-Experts model"
            )
        if any(is_quantised(name) for name in self.reader.names):
            return (
                f"{self.folder} holds quantised experts, and its config.json has no quantization_config that says how: "
                "save or download both again, or convert them to bfloat16 first"
            )
        example = self.architecture.layouts[0].down.format(layer=0, expert=0)
        return (
            f"{self.folder} says model_type={self.model_type!r} but has no tensor such as {example}: "
            "give a checkpoint of the whole model"
        )


def open_checkpoint(
    path: str | None, *, revision: str | None = None, force_download: bool = False
) -> Checkpoint:
    """Open a checkpoint folder, a hub id, or (None) the embedded model.

    Reads `config.json` and headers, no weights. Raises CheckpointError if it cannot be found or downloaded,
    or is of an unknown architecture, quantised, incomplete or damaged.
    """
    return Checkpoint(resolve(path, revision=revision, force_download=force_download))


def extract_expert_weights(
    model_name_or_path: str,
    include_shared: bool = False,
    force_download: bool = False,
    max_experts: int | None = None,
    single_layer: int | None = None,
    sample_method: str = "first_n",
) -> dict[str, list[Tensor]]:
    """Return the up and gate matrices of a checkpoint folder or hub id: keys "up" and "gate", lists of (p, d) tensors.

    Layers ascend, experts within a layer too, the shared expert (`include_shared`) last; `single_layer`
    takes one layer, None all that have routed experts. At most `max_experts` of a layer, by `sample_method`
    "first_n" or "evenly_spaced". Tensors keep the checkpoint's dtype. Raises CheckpointError as
    `Checkpoint.read_experts`.
    """
    checkpoint = open_checkpoint(model_name_or_path, force_download=force_download)
    layers = checkpoint.moe_layers if single_layer is None else (single_layer,)
    weights: dict[str, list[Tensor]] = {"up": [], "gate": []}
    for layer in layers:
        for family, matrices in weights.items():
            experts = checkpoint.read_experts(
                layer,
                family,
                include_shared=include_shared,
                max_experts=max_experts,
                sample_method=sample_method,
            )
            matrices.extend(experts.weights)
    return weights


def choose_experts(n: int, max_experts: int | None, sample_method: str) -> tuple[int, ...]:
    """Return which of n experts to take: all, the first `max_experts`, or as many from the first to the last."""
    if max_experts is not None and max_experts < 1:
        raise CheckpointError(
            f"model.max_experts={max_experts} is not possible: give at least 1, or null for all"
        )
    count = n if max_experts is None else min(max_experts, n)
    match sample_method:
        case "first_n":
            return tuple(range(count))
        case "evenly_spaced":
            return tuple(i * (n - 1) // max(count - 1, 1) for i in range(count))
        case _:
            raise CheckpointError(f"model.sample_method={sample_method!r}: choose first_n or evenly_spaced")


def _ranges(numbers: tuple[int, ...]) -> str:
    """Return (1, 2, 3, 5) as "1-3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
