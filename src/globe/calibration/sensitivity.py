"""How much the model changes if the experts of one layer and family are replaced, and nothing else.

One streamed pass measures all replacements: each starts from the original's hidden states at its own layer and goes on
beside the original through the layers after it. Loading every layer once, and in memory one layer at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from globe.calibration.decoder import Decoder
from globe.calibration.experts_module import ExpertsView
from globe.calibration.run import Request, prepare
from globe.checkpoint import Checkpoint
from globe.config.calibrate_options import CalibrateConfig
from globe.numerics.divergence import kl_divergence

Candidates = Callable[[int, str], Sequence[Float[Tensor, "n p d"]]]
"""(layer, family) -> sets of all n routed experts' matrices to try, as `Checkpoint.read_experts` gives them."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one replacement does to the next-token distributions on the calibration text."""

    layer: int
    family: str
    candidate: int
    """its place in what was tried for the layer and family"""
    kl: float
    """KL(original || replaced), nats per token"""


def sensitivities(
    checkpoint: Checkpoint,
    options: CalibrateConfig,
    candidates: Candidates,
    places: Sequence[tuple[int, str]],
    *,
    tokens: int = 4096,
    device: torch.device | None = None,
) -> tuple[Sensitivity, ...]:
    """Return the divergence of the model with one (layer, family) of `places` replaced by each of its candidates.

    Takes `tokens` tokens of `calibrate.text` at most, spread over it. `candidates` is called once for each place, when
    its layer is in memory. Equal calls give equal figures. Raises as `globe.calibration.run.calibrate` does.
    """
    fewer = {"tokens": min(tokens, options.tokens), "gradient_tokens": 0, "out": None}
    request = prepare(checkpoint, CalibrateConfig(**{**vars(options), **fewer}))
    decoder = Decoder(checkpoint, dtype=request.dtype, device=device or torch.device("cpu"), head=True)
    with tempfile.TemporaryDirectory(prefix="globe-sensitivity-") as folder:
        return _Pass(decoder, request, Path(folder)).run(candidates, sorted(set(places)))


class _Pass:
    """The hidden states of the original and of all replacements so far, in files."""

    def __init__(self, decoder: Decoder, request: Request, folder: Path) -> None:
        self._decoder, self._folder = decoder, folder
        self._batches = request.windows.split(request.options.batch)
        self._windows = request.windows
        self._original: Tensor | None = None
        self._variants: list[tuple[tuple[int, str, int], Tensor]] = []

    def run(self, candidates: Candidates, places: Sequence[tuple[int, str]]) -> tuple[Sensitivity, ...]:
        for layer in range(self._decoder.layers):
            with self._decoder.loaded(layer):
                families = [family for at, family in places if at == layer]
                fresh = self._replaced(layer, families, candidates)
                for _, states in self._variants:
                    self._advance(layer, states, states)
                self._variants += fresh
                before = self._original
                self._original = self._advance(layer, before, before)
        return tuple(
            Sensitivity(*place, kl=kl)
            for (place, _), kl in zip(self._variants, self._divergences(), strict=True)
        )

    def _replaced(
        self, layer: int, families: Sequence[str], candidates: Candidates
    ) -> list[tuple[tuple[int, str, int], Tensor]]:
        """Return what the replacements of this layer make of the original's hidden states."""
        if not families:
            return []
        view: ExpertsView = self._decoder.experts(layer)[1]
        found = []
        for family in families:
            for number, weights in enumerate(candidates(layer, family)):
                with view.replaced(family, weights.to(self._decoder.device)):
                    found.append(((layer, family, number), self._advance(layer, self._original, None)))
        return found

    @torch.no_grad()
    def _advance(self, layer: int, before: Tensor | None, after: Tensor | None) -> Tensor:
        """Run all windows through a loaded layer; the result goes into `after`, or a file of its own."""
        start = 0
        for ids in self._batches:
            stop = start + ids.shape[0]
            given = None if before is None else before[start:stop].to(self._decoder.device, copy=True)
            output = self._decoder.step(layer, ids, given).cpu()
            if after is None:
                after = self._room(output)
            after[start:stop] = output
            start = stop
        assert after is not None
        return after

    def _room(self, like: Tensor) -> Tensor:
        """Return a file as large as the hidden states of all windows."""
        shape = (self._windows.shape[0], *like.shape[1:])
        path = self._folder / f"states-{len(list(self._folder.iterdir()))}.bin"
        size = torch.Size(shape).numel()
        return torch.from_file(str(path), shared=True, size=size, dtype=like.dtype).view(shape)

    @torch.no_grad()
    def _divergences(self) -> list[float]:
        """Return the nats per token of every replacement, over all tokens of the windows, window by window."""
        assert self._original is not None
        sums = torch.zeros(len(self._variants), dtype=torch.float64)
        for number, ids in enumerate(self._windows):
            one = slice(number, number + 1)
            original = self._logits(ids[None], self._original[one])
            for place, (_, states) in enumerate(self._variants):
                sums[place] += kl_divergence(original, self._logits(ids[None], states[one])).double().sum()
        return (sums / self._windows.numel()).tolist()

    def _logits(self, ids: Int[Tensor, "b t"], states: Tensor) -> Float[Tensor, "t v"]:
        return (
            self._decoder.logits(ids, states.to(self._decoder.device, copy=True)).flatten(0, 1).float().cpu()
        )
