"""Does a minute of distillation after a fit pay? One number per row of every adapter, trained on the calibration text.

    python experiments/bench/recovery.py RUN --checkpoint CHECKPOINT --calibration TEXT --text HELDOUT --seconds 60

The banks of a run are put factored into the model; beside it runs the original. Adam moves a factor of each row of the
adapters, 1 at first, so that KL(original || compressed) falls on windows of the calibration text; nothing else moves,
and the factors fold into the adapters, so that no number is added. Windows that are set aside say whether it helped:
the scales are kept only if the divergence fell there. Reported is the divergence on the held-out text, spread over it.
Seconds are of the processor.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from globe.calibration.text import read_file, read_tokenizer, spread_windows, tokenise
from globe.embedded import calibration_path, text_path
from globe.hf import load, patch_model
from globe.hf.experts import GlobeExperts
from globe.numerics.divergence import kl_divergence

ASIDE = 16
"""Windows of the calibration text that decide and are not trained on."""


class RowScale(nn.Module):
    """A factor of each row of the adapters (h, p, r)."""

    def __init__(self, adapters: Tensor) -> None:
        super().__init__()
        self.excess = nn.Parameter(torch.zeros(*adapters.shape[:2], 1, dtype=torch.float32))

    def forward(self, adapters: Tensor) -> Tensor:
        return adapters * (1 + self.excess)


def factored(model: nn.Module) -> list[nn.Module]:
    """The projections of a model that have adapters."""
    experts = [one for one in model.modules() if isinstance(one, GlobeExperts)]
    found = [projection for one in experts for projection in one.projections.values()]
    return [one for one in found if "adapters" in dict(one.named_parameters())]


@contextmanager
def scaled(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let row factors be trained and nothing else; at the end they are folded into the adapters."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    places = factored(model)
    scales = []
    for place in places:
        scale = RowScale(place.adapters)
        parametrize.register_parametrization(place, "adapters", scale)
        scales.append(scale.excess)
    try:
        yield scales
    finally:
        for place in places:
            parametrize.remove_parametrizations(place, "adapters")


def divergence(original: Any, model: Any, windows: Int[Tensor, "w t"], *, batch: int = 4) -> float:
    """Mean KL of the next token over all tokens of the windows, nats."""
    total = 0.0
    with torch.no_grad():
        for ids in windows.split(batch):
            pair = [one(ids, use_cache=False).logits.flatten(0, 1) for one in (original, model)]
            total += float(kl_divergence(*pair).double().sum())
    return total / windows.numel()


def distil(
    original: Any,
    model: Any,
    windows: Int[Tensor, "w t"],
    scales: list[nn.Parameter],
    *,
    seconds: float,
    rate: float,
    batch: int = 4,
) -> int:
    """Train the scales for so many processor seconds; the learning rate falls to zero. Return the steps made."""
    optimiser = torch.optim.Adam(scales, lr=rate, betas=(0.9, 0.98))
    begin, steps = time.process_time(), 0
    while (spent := time.process_time() - begin) < seconds:
        for group in optimiser.param_groups:
            group["lr"] = rate * max(0.02, min(1.0, steps / 5 + 0.2) * (1 - spent / seconds))
        at = torch.arange(batch * steps, batch * (steps + 1)) % windows.shape[0]
        loss = kl_loss(original, model, windows[at])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
    return steps


def kl_loss(original: Any, model: Any, ids: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    with torch.no_grad():
        wanted = torch.log_softmax(original(ids, use_cache=False).logits, -1)
    found = torch.log_softmax(model(ids, use_cache=False).logits, -1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run of globe.train")
    parser.add_argument("--checkpoint", required=True, help="the model it was learned from")
    parser.add_argument("--calibration", default="embedded")
    parser.add_argument("--text", default="embedded", help="held-out text")
    parser.add_argument("--tokens", type=int, default=20000, help="of the held-out text, spread over it")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    tokenizer = read_tokenizer(Path(options.checkpoint))

    def windows(text: str, embedded: Path, option: str, tokens: int) -> Tensor:
        ids = tokenise(read_file(text, embedded=embedded, option=option).content, tokenizer).ids
        return spread_windows(ids, window=options.window, tokens=tokens)

    heldout = windows(options.text, text_path(), "text", options.tokens)
    calibration = windows(options.calibration, calibration_path(), "calibration", 200_000)
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))
    aside, used = calibration[order[:ASIDE]], calibration[order[ASIDE:]]
    original = load(options.checkpoint, dtype=torch.float32)
    before = None
    for rate in options.rates:
        model = patch_model(load(options.checkpoint, dtype=torch.float32), options.run, S_cache="all")
        before = before or (divergence(original, model, aside), divergence(original, model, heldout))
        with scaled(model) as scales:
            steps = distil(original, model, used, scales, seconds=options.seconds, rate=rate)
        model.requires_grad_(False)
        after = divergence(original, model, aside), divergence(original, model, heldout)
        found = {
            "rate": rate,
            "steps": steps,
            "numbers": sum(one.numel() for one in scales),
            "kl_aside": [before[0], after[0]],
            "kl_heldout": [before[1], after[1]],
            "kept": after[0] < before[0],
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
