"""How much of a divergence comes from tokens that are sent to other experts than before.

    python experiments/bench/router_flips.py MODEL RUN [RUN ...] --text heldout.txt [--max-tokens 16384]

A router near a tie sends a token elsewhere for the smallest error. Such a token has a hundred times the divergence
of others, so few of them decide a small mean. RUN is a folder that globe.train made of MODEL. Printed for each: KL over
all tokens, KL over those that keep their experts in every layer, how many do not, and their share of the sum.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from perplexity import spread_windows
from torch import Tensor, nn

from globe.calibration.experts_module import experts_modules
from globe.calibration.text import tokenise
from globe.checkpoint import open_checkpoint
from globe.evaluation.subject import Subject, load_tokenizer
from globe.evaluation.text import read_text
from globe.hf import patch_model

WINDOW, STRIDE, BATCH = 256, 128, 16
CPU = torch.device("cpu")


class Routed:
    """A model that remembers to which experts it sent the tokens of its last call."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.chosen: list[Tensor] = []
        for name in experts_modules(model).values():
            model.get_submodule(name).register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (which,) = (one for one in inputs if not one.is_floating_point())
        self.chosen.append(which.flatten(0, -2).sort(dim=-1).values)

    def __call__(self, ids: Tensor) -> Tensor:
        self.chosen.clear()
        return self.model(ids).logits.log_softmax(dim=-1)


@torch.no_grad()
def compared(original: Routed, others: list[Routed], batch: Tensor, scored: Tensor) -> list[Tensor]:
    """Return, for each other model, the divergence of the scored tokens (row 0) and whether they moved (row 1)."""
    wanted, found = original(batch), []
    for other in others:
        here = other(batch)
        kl = (wanted.exp() * (wanted - here)).sum(dim=-1).flatten()
        moved = torch.zeros(len(kl), dtype=torch.bool)
        for one, two in zip(original.chosen, other.chosen, strict=True):
            moved |= (one != two).any(dim=-1)
        found.append(torch.stack([kl.double(), moved.double()])[:, scored.flatten()])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--max-tokens", type=int, help="of the text, spread over it; left out, all")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    checkpoint = open_checkpoint(given.model)
    subject = Subject(given.model, checkpoint.folder, checkpoint)
    tokens = tokenise(read_text(given.text).content, load_tokenizer(subject, None, None)).ids
    windows = spread_windows(len(tokens), given.max_tokens, window=WINDOW, stride=STRIDE)
    windows = tuple(window for window in windows if window.stop - window.start == WINDOW)
    models = [subject.load(dtype=torch.float32, device=CPU, S_cache=None) for _ in (None, *given.runs)]
    for model, run in zip(models[1:], given.runs, strict=True):
        patch_model(model, run, dense=True)
    original, *others = [Routed(model) for model in models]
    parts: list[list[Tensor]] = [[] for _ in others]
    for at in range(0, len(windows), BATCH):
        group = windows[at : at + BATCH]
        batch = torch.stack([tokens[window.start : window.stop] for window in group])
        scored = torch.stack([torch.arange(WINDOW) >= WINDOW - window.scored for window in group])
        for part, one in zip(parts, compared(original, others, batch, scored), strict=True):
            part.append(one)
    print(
        "| run | tokens | KL | KL of tokens that keep their experts | tokens that move | their share of the sum |"
    )
    print("|---|---|---|---|---|---|")
    for run, part in zip(given.runs, parts, strict=True):
        kl, moved = torch.cat(part, dim=1)
        share = float(kl[moved > 0].sum() / kl.sum())
        others_kl = float(kl[moved == 0].mean())
        print(
            f"| {run.name} | {len(kl)} | {kl.mean():.3g} | {others_kl:.3g} | {int(moved.sum())} | {share:.0%} |"
        )


if __name__ == "__main__":
    main()
