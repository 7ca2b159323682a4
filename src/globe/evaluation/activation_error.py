"""How far the output of each MoE block is from the original's, on the inputs that the original has there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from globe.calibration.experts_module import experts_modules
from globe.calibration.text import Tokens
from globe.evaluation.text import Window, batches
from globe.numerics.precision import to_float64


@dataclass(frozen=True, slots=True)
class LayerError:
    """Relative errors ||y - y'||_F / ||y||_F of one layer over all tokens."""

    layer: int
    block: float
    """of the MoE block: routed experts, router and, where there is one, the shared expert"""
    experts: float
    """of the routed experts' weighted sum alone"""


class _Sums:
    """Squared norms of the original's output and of the difference, added up batch by batch."""

    def __init__(self) -> None:
        self.error = self.norm = 0.0

    def add(self, original: Any, compressed: Any) -> None:
        before, after = to_float64(_hidden(original)), to_float64(_hidden(compressed))
        self.error += float((after - before).square().sum())
        self.norm += float(before.square().sum())

    @property
    def relative(self) -> float:
        if self.norm == 0:
            return 0.0 if self.error == 0 else math.inf
        return math.sqrt(self.error / self.norm)


@torch.no_grad()
def activation_errors(
    original: Any,
    compressed: nn.Module,
    tokens: Tokens,
    windows: Sequence[Window],
    *,
    batch: int,
    device: torch.device,
) -> tuple[LayerError, ...]:
    """Return the errors of every layer that has experts in both models, over the tokens of the windows.

    The windows go through the original alone. Whenever one of its blocks has run, the compressed model's
    block is given the same input, so errors of earlier layers are not in it and no input is kept.
    """
    names = experts_modules(original)
    twins = experts_modules(compressed)
    shared = sorted(set(names) & set(twins))
    blocks, experts = {layer: _Sums() for layer in shared}, {layer: _Sums() for layer in shared}
    with ExitStack() as stack:
        for layer in shared:
            pair = [(model, one[layer]) for model, one in ((original, names), (compressed, twins))]
            stack.enter_context(_replayed(*pair[0], *pair[1], blocks[layer], experts[layer]))
        for group in batches(windows, batch):
            ids = torch.stack([tokens.ids[window.start : window.stop] for window in group]).to(device)
            original(ids, use_cache=False)
    return tuple(LayerError(layer, blocks[layer].relative, experts[layer].relative) for layer in shared)


@contextmanager
def _replayed(
    original: nn.Module, name: str, compressed: nn.Module, twin_name: str, block: _Sums, experts: _Sums
) -> Iterator[None]:
    """Run the compressed model's block after the original's, and compare what both and their experts give."""
    twin = compressed.get_submodule(_parent(twin_name))
    given: dict[str, Any] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given["original"] = output

    def compare_experts(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        experts.add(given.pop("original"), output)

    def replay(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        block.add(output, twin(*args, **kwargs))

    handles = [
        original.get_submodule(name).register_forward_hook(keep),
        compressed.get_submodule(twin_name).register_forward_hook(compare_experts),
        original.get_submodule(_parent(name)).register_forward_hook(replay, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _hidden(output: Any) -> Tensor:
    """Return the hidden states of an output, which some blocks give together with their router's logits."""
    return output[0] if isinstance(output, tuple) else output
