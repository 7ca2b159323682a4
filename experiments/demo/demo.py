"""The end of `make demo`: both patched checkpoints beside the original, as a user of transformers loads them.

    python experiments/demo/demo.py FOLDER [--prompt TEXT] [--tokens 60] [--seed 0]

FOLDER holds `run/`, and `dense/` and `globe/` written from it by globe.patch and measured by globe.evaluate. Loads
all three models with plain AutoModelForCausalLM, checks that the two patched ones say the same, prints what was lost
and saved, and lets the original and the compressed model continue the same text. They draw with the same seed, so
their texts part where their distributions do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import globe  # transformers knows compact checkpoints from here on
import globe.embedded

PROMPT = "And it came to pass in those days, that"
SAME = 0.1
"""How far apart the two forms may be, as a share of how far both are from the original: each rounds other numbers to
bfloat16."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where run/, dense/ and globe/ are")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=60, help="length of the continuation")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(folder: Path) -> Any:
    """No function of globe's: this is all that a user of transformers has to write."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def evaluation(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    if not path.is_file():
        sys.exit(f"{path} is missing: run make demo, or python -m globe.evaluate model={folder}")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def sizes_of(folder: Path) -> str:
    """Which sizes the banks of a run have, and how well they fit: one line."""
    record: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    banks = record["banks"]
    sizes = {
        f"m={one['m']} r={one['r']}" + (f" k={one['atom_rank']}" if one["atom_rank"] else "") for one in banks
    }
    return f"{len(banks)} banks of {', '.join(sorted(sizes))}; RelFrob {record['relfrob']:.4f} on average"


def table(dense: dict[str, Any], compact: dict[str, Any]) -> Table:
    """Before and after: the original, and both forms of the compressed model."""
    made = Table(
        title=f"before and after, {dense['settings']['counted_tokens']:,} tokens", title_justify="left"
    )
    made.add_column("figure")
    for heading in ("original", "format=dense", "format=globe"):
        made.add_column(heading, justify="right")
    pair = (dense, compact)
    before = dense["perplexity_original"]
    for label, name, form in (
        ("perplexity per token", "perplexity", "{:.2f}"),
        ("bits per byte", "bits_per_byte", "{:.4f}"),
    ):
        made.add_row(
            label, *(form.format(one[name]) for one in (before, *(each["perplexity"] for each in pair)))
        )
    made.add_row("KL(original || model), nats", "0", *(f"{one['divergence']['kl']:.4f}" for one in pair))
    agreement = (f"{one['divergence']['top1_agreement']:.1%}" for one in pair)
    made.add_row("same likeliest next token", "100.0%", *agreement)
    errors = [[layer["block"] for layer in one["activation_errors"]] for one in pair]
    made.add_row("MoE block, relative error", "0", *(f"{sum(each) / len(each):.4f}" for each in errors))
    made.add_section()
    for label, name in (
        ("parameters of gate and up, as factors", "family_parameters"),
        ("parameters of the model, so counted", "model_parameters"),
        ("bytes of gate and up in files", "family_bytes"),
        ("bytes of the model in files", "model_bytes"),
    ):
        sizes = [one["sizes"][name] for one in pair]
        after = (f"{size['after']:,} ({size['ratio']:.1%})" for size in sizes)
        made.add_row(label, f"{sizes[0]['before']:,}", *after)
    return made


@torch.no_grad()
def usual_difference(one: Any, other: Any, ids: torch.Tensor) -> float:
    """The largest difference of two logits at the median token: at a single one a rounding may decide the routing."""
    return float((one(ids).logits - other(ids).logits).abs().amax(dim=-1).median())


def continuation(model: Any, tokenizer: Any, options: argparse.Namespace) -> str:
    given = tokenizer(options.prompt, return_tensors="pt")
    torch.manual_seed(options.seed)
    out = model.generate(
        **given,
        do_sample=True,
        temperature=0.8,
        top_k=40,
        max_new_tokens=options.tokens,
        min_new_tokens=options.tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def main() -> None:
    options = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dense, compact = (evaluation(options.folder / form) for form in ("dense", "globe"))
    models = {
        "original": load(globe.embedded.path()),
        "dense": load(options.folder / "dense"),
        "globe": load(options.folder / "globe"),
    }
    tokenizer = AutoTokenizer.from_pretrained(globe.embedded.path())
    ids = tokenizer(options.prompt, return_tensors="pt").input_ids
    apart = usual_difference(models["dense"], models["globe"], ids)
    moved = usual_difference(models["original"], models["globe"], ids)
    console = Console(width=100)
    console.print(sizes_of(options.folder / "run"), highlight=False)
    console.print(table(dense, compact))
    console.print(
        f"logits on the prompt, largest difference at the median token: dense to globe {apart:.4f}, original to globe "
        f"{moved:.4f}",
        highlight=False,
    )
    for name, what in (("original", "the original"), ("globe", "the compressed model, format=globe")):
        console.rule(what, align="left")
        console.print(continuation(models[name], tokenizer, options), markup=False, highlight=False)
    if apart > SAME * moved:
        sys.exit("the two forms of the compressed model differ by more than rounding: patch the run again")


if __name__ == "__main__":
    main()
