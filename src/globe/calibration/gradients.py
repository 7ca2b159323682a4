"""What an error of a layer's output costs in nats, for every layer: gradients go backward through the model once.

One decoder layer at a time is in memory. The hidden states before every layer are kept on disk on the way forward; on
the way back each layer is computed again from those before it, with the gradient by those after it. A pass that was
killed goes on with the layer it was in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from globe.calibration.decoder import Decoder
from globe.calibration.hidden_states import HiddenStates, Progress
from globe.calibration.statistics import OutputWeights
from globe.errors import CheckpointError

FOLDER = "gradients"


class GradientPass:
    """One pass over windows of tokens, with its files in the folder of a calibration."""

    def __init__(self, decoder: Decoder, windows: Int[Tensor, "w t"], folder: Path, *, batch: int) -> None:
        self._decoder, self._windows, self._batch = decoder, windows, batch
        self._folder = folder / FOLDER
        self._states = HiddenStates(self._folder / "forward", keep=True)
        self._gradients = HiddenStates(self._folder / "backward")

    def run(
        self,
        has: Callable[[int], bool],
        write: Callable[[int, OutputWeights], None],
        on_layer: Callable[[], Any],
    ) -> None:
        """Write the weights of the outputs of all layers with experts, the last layer first.

        `has` says whether those of a layer are written. Raises CheckpointError for probabilities that are not finite,
        ArtefactError when the disk refuses.
        """
        for part in ("forward", "backward"):
            (self._folder / part).mkdir(parents=True, exist_ok=True)
        decoder, moe = self._decoder, self._decoder.moe_layers
        states = self._forward(on_layer)
        done = self._gradients.found()
        if done is None or not all(has(layer) for layer in moe if layer >= done.next):
            done = self._from_head(states)
        for layer in range(done.next - 1, min(moe) - 1, -1):
            with decoder.loaded(layer):
                done, weights = self._backward(layer, states, done)
                if weights is not None:
                    write(layer, weights)
            self._gradients.commit(done)
            on_layer()

    @torch.no_grad()
    def _forward(self, on_layer: Callable[[], Any]) -> Progress:
        """Write the hidden states before every layer, and after the last."""
        decoder, done = self._decoder, self._states.found()
        decoder.wrapped = None if done is None else done.wrapped
        for layer in range(0 if done is None else done.next, decoder.layers):
            before = None if done is None else self._states.read(done)
            after: Tensor | None = None
            with decoder.loaded(layer):
                for part, ids in self._parts():
                    given = None if before is None else before[part].to(decoder.device, copy=True)
                    output = decoder.step(layer, ids, given)
                    if after is None:
                        shape = (len(self._windows), *output.shape[1:])
                        after = self._states.create(layer + 1, shape, output.dtype)
                    after[part] = output.cpu()
            assert after is not None
            dtype = str(after.dtype).removeprefix("torch.")
            done = Progress(layer + 1, tuple(after.shape), dtype, decoder.wrapped)
            self._states.commit(done)
            on_layer()
        assert done is not None
        return done

    def _from_head(self, states: Progress) -> Progress:
        """Write the gradient after the last layer: that of the log probabilities of tokens drawn at every place."""
        last = self._states.read(states)
        gradient = self._gradients.create(states.next, last.shape, last.dtype)
        for number, ids in enumerate(self._windows):
            hidden = last[number : number + 1].to(self._decoder.device, copy=True).requires_grad_()
            with torch.enable_grad():
                logs = self._decoder.logits(ids[None], hidden).float().log_softmax(-1).flatten(0, 1)
            drawn = _draw(logs.detach().exp().cpu(), seed=number).to(logs.device)
            (found,) = torch.autograd.grad(logs.gather(1, drawn).sum(), hidden)
            gradient[number] = found[0].cpu()
        self._gradients.commit(states)
        return states

    def _backward(
        self, layer: int, states: Progress, done: Progress
    ) -> tuple[Progress, OutputWeights | None]:
        """Write the gradient before a loaded layer; return F of its experts' output, if it has any."""
        decoder = self._decoder
        after = self._gradients.read(done)
        before = self._states.read(replace(states, next=layer)) if layer else None
        gradient = self._gradients.create(layer, after.shape, after.dtype)
        experts = decoder.experts(layer) if layer in decoder.moe_layers else None
        total, rows = torch.zeros((), dtype=torch.float64), 0
        for part, ids in self._parts():
            hidden = None if before is None else before[part].to(decoder.device, copy=True).requires_grad_()
            with torch.enable_grad(), _probed(None if experts is None else experts[0]) as probes:
                output = decoder.step(layer, ids, hidden)
                at = probes if hidden is None else [hidden, *probes]
                found = torch.autograd.grad(output, at, after[part].to(output))
            if hidden is not None:
                gradient[part] = found[0].cpu()
            for one in found[len(found) - len(probes) :]:
                flat = one.reshape(-1, one.shape[-1]).float()
                total, rows = total.to(flat.device) + flat.mT @ flat, rows + len(flat)
        weights = None
        if experts is not None and rows:
            F = (total / rows).float()
            norms = experts[1].down_energies()
            down = torch.where(norms > 0, experts[1].down_energies(F) / norms, 0.0)
            weights = OutputWeights(F.cpu(), down.cpu())
        return replace(done, next=layer), weights

    def _parts(self) -> Iterator[tuple[slice, Int[Tensor, "b t"]]]:
        start = 0
        for ids in self._windows.split(self._batch):
            yield slice(start, start + len(ids)), ids
            start += len(ids)


def discard(folder: Path) -> None:
    """Remove what a pass leaves in the folder of a calibration; call it once all its weights are written."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


@contextmanager
def _probed(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """Add zeros to what a module gives; the list holds them after a call, to take the gradient by them."""
    probes: list[Tensor] = []

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        probes.append(torch.zeros_like(output, requires_grad=True))
        return output + probes[-1]

    if module is None:
        yield probes
        return
    handle = module.register_forward_hook(add)
    try:
        yield probes
    finally:
        handle.remove()


def _draw(probabilities: Float[Tensor, "t v"], *, seed: int) -> Int[Tensor, "t 1"]:
    """Return one token drawn at every place."""
    if not bool(torch.isfinite(probabilities).all()):
        raise CheckpointError(
            "the model's probabilities on the calibration text are not finite: give calibrate.dtype=float32, or "
            "calibrate.gradient_tokens=0, which takes no gradients"
        )
    return torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))
