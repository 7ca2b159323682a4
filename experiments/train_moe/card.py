"""The model card: what the model is, how to make it again, and how trained its experts are."""

from __future__ import annotations

import argparse
import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from architectures import Sizes, expert_matrices
from measure import expert_load, perplexity, similarity, spectrum_figures, zeroed
from text import encode

if TYPE_CHECKING:
    from fit import Training

PACKAGES = ("torch", "transformers", "tokenizers")


def _file(path: Path) -> str:
    data = path.read_bytes()
    return f"`{path.name}` ({len(data):,} bytes, SHA-256 `{hashlib.sha256(data).hexdigest()[:16]}...`)"


def _expert_rows(start: list[dict[str, Tensor]], now: list[dict[str, Tensor]], rank: int) -> list[str]:
    rows = []
    for layer, (before, after) in enumerate(zip(start, now, strict=True)):
        for family in ("up", "gate"):
            first, last = (spectrum_figures(one[family], rank=rank) for one in (before, after))
            alike = similarity(after[family], before[family])
            rows.append(
                f"| {layer}, {family} "
                f"| {first['effective_rank']:.1f} -> {last['effective_rank']:.1f} "
                f"| {first['svd_error']:.3f} -> {last['svd_error']:.3f} "
                f"| {first['shared_error']:.3f} -> {last['shared_error']:.3f} "
                f"| {alike.mean():.2f} (largest {alike.max():.2f}) |"
            )
    return rows


def write_card(
    folder: Path,
    command: str,
    args: argparse.Namespace,
    sizes: Sizes,
    trainings: list[Training],
    start: list[dict[str, Tensor]],
    *,
    training_tokens: int,
) -> str:
    """Writes README.md into `folder` and returns its text. All figures are of the saved files, read back.

    `start` holds the experts before training (architectures.expert_matrices).
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout = encode(tokenizer, args.heldout.read_text(encoding="utf-8"))
    whole = perplexity(model, heldout, window=sizes.context)
    layers = list(range(len(start)))
    without = []
    for chosen in (layers, *([layer] for layer in layers)):
        with zeroed(model, chosen):
            name = "all layers" if chosen == layers else f"layer {chosen[0]}"
            without.append(f"| {name} | {perplexity(model, heldout, window=sizes.context):,.1f} |")
    loads = expert_load(model, heldout, window=sizes.context, top_k=sizes.top_k)
    used = ", ".join(f"{float(load.min()):.3f} to {float(load.max()):.3f}" for load in loads)
    rank = min(sizes.rows, sizes.columns) // 4
    parameters = sum(weight.numel() for weight in model.parameters())
    taken = [f"{one.steps:,} steps ({one.tokens:,} tokens, {one.seconds:.0f} s)" for one in trainings]
    recipe = "by upcycling a dense model" if args.upcycle_steps else "from scratch"
    if args.start:
        recipe = f"on from `{args.start.name}`"
    lines = [
        f"# {folder.name}",
        "",
        f"A language model of {parameters / 1e6:.2f} M parameters, architecture `{args.architecture}`, trained",
        f"{recipe} so that there are trained experts to compress. It is a benchmark, not a useful language model.",
        "",
        f"{sizes.layers} layers, {sizes.experts} experts a layer (top {sizes.top_k}), p = {sizes.rows}, "
        f"d = {sizes.columns}, vocabulary {sizes.vocabulary} (byte-level BPE), bfloat16.",
        "",
        "## How it was made",
        "",
        f"    {command}",
        "",
        f"- Text, public domain: {', '.join(_file(path) for path in args.text)}; {training_tokens:,} tokens.",
        "  Every 25th piece of 4,096 characters was kept back from it to choose the weights.",
        f"- Held out: {_file(args.heldout)}.",
        f"- AdamW, peak learning rate {args.learning_rate:g}, weight decay {args.weight_decay:g}, cosine,",
        f"  batch {args.batch} x {args.context}, router loss {args.aux_loss:g}, seed {args.seed}, "
        f"{args.threads} CPU thread(s): {' then '.join(taken)}.",
        f"- Python {platform.python_version()}, {', '.join(f'{one} {version(one)}' for one in PACKAGES)}.",
        "",
        "## Figures",
        "",
        f"Held-out perplexity **{whole:.1f}** ({len(heldout):,} tokens, float32, windows of {sizes.context}",
        f"without overlap); {trainings[-1].validation:.1f} on the pieces kept back.",
        "",
        "Do the routed experts matter? Held-out perplexity with them set to zero in",
        "",
        "| layers | perplexity |",
        "|---|---|",
        *without,
        "",
        f"Is every expert used? Share of the routed held-out tokens per expert, layer by layer: {used}",
        f"(an even share is {1 / sizes.experts:.3f}).",
        "",
        "Are the matrices more than random? At the start -> after training: effective rank (95 % of the",
        f"energy, mean over experts), relative Frobenius error of a rank-{rank} SVD and of one",
        f"basis of {2 * rank} rows shared by all, and the cosine between an expert and its own start.",
        "",
        "| layer, family | effective rank | SVD error | shared-basis error | cosine to the start |",
        "|---|---|---|---|---|",
        *_expert_rows(start, expert_matrices(model), rank),
        "",
    ]
    text = "\n".join(lines)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text
