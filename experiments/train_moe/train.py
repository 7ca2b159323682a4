"""Train a small Mixture-of-Experts language model on public-domain text, from scratch or by upcycling.

    python experiments/train_moe/train.py --architecture mixtral --text TEXT... --heldout TEXT --out FOLDER

The benchmarks need experts that were really trained: random matrices have no structure to compress. README.md
in this folder tells what was made with it.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from architectures import (
    ARCHITECTURES,
    Sizes,
    build,
    dense_config,
    expert_matrices,
    moe_config,
)
from card import write_card
from fit import fit
from reshape import reshape
from text import encode, split, train_tokenizer
from upcycle import upcycle


def parse(arguments: list[str]) -> argparse.Namespace:
    story, defaults = __doc__.splitlines()[0], argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=story, formatter_class=defaults)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, help="UTF-8 files to train on")
    add("--heldout", type=Path, required=True, help="UTF-8 file for the card's perplexity, never trained on")
    add("--out", type=Path, required=True, help="new folder for the model")
    add("--architecture", choices=sorted(ARCHITECTURES), default="qwen2_moe")
    add("--layers", type=int, default=2)
    add("--columns", type=int, default=160, help="d, the hidden size")
    add("--rows", type=int, default=128, help="p, the rows of an expert")
    add("--experts", type=int, default=12, help="n, routed experts of a layer")
    add("--top-k", type=int, default=2, help="experts of a token")
    add("--heads", type=int, default=5)
    add("--shared", type=int, default=16, help="rows of the shared expert (qwen2_moe only)")
    add("--vocabulary", type=int, default=2048)
    add("--context", type=int, default=256, help="tokens of a window")
    add("--batch", type=int, default=8, help="windows of a step")
    add("--steps", type=int, default=2000)
    add("--upcycle-steps", type=int, default=0, help="steps of a dense model to start from (qwen2_moe only)")
    add("--start", type=Path, help="trained qwen2_moe with narrower experts or smaller heads to start from")
    add("--untied", action="store_true", help="a head of its own instead of the embedding again")
    add(
        "--raw-routing",
        action="store_true",
        help="routing weights that are not normalised over the chosen experts",
    )
    add("--fresh", type=float, default=0.5, help="share of an expert's neurons that upcycling leaves random")
    add("--learning-rate", type=float, default=2e-3, help="peak; cosine to a twentieth after 2 %% of warm-up")
    add("--weight-decay", type=float, default=0.1)
    add("--aux-loss", type=float, default=0.01, help="weight of the router's load-balancing loss")
    add("--evaluate-every", type=int, default=100, help="steps between validations; the best are kept")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--time-limit", type=float, default=math.inf, help="seconds of a training; the cosine ends with them")
    args = parser.parse_args(arguments)
    if args.columns % args.heads:
        parser.error(f"--heads {args.heads} does not divide --columns {args.columns}")
    if not 1 <= args.top_k <= args.experts:
        parser.error(f"--top-k {args.top_k} is not between 1 and --experts {args.experts}")
    if args.upcycle_steps and args.architecture != "qwen2_moe":
        parser.error("--upcycle-steps is for --architecture qwen2_moe only")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty: name a new folder")
    if args.raw_routing and "norm_topk_prob" not in ARCHITECTURES[args.architecture][2]:
        parser.error(f"--raw-routing: {args.architecture} leaves no choice of how routing weights are made")
    if args.start and args.architecture != "qwen2_moe":
        parser.error("--start is for --architecture qwen2_moe only")
    if args.start and args.upcycle_steps:
        parser.error("--start and --upcycle-steps are two starts: give one")
    for path in (*args.text, args.heldout):
        if not path.is_file():
            parser.error(f"{path} is not a file")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    text, held_back = split(args.text)
    if args.start:
        tokenizer = AutoTokenizer.from_pretrained(args.start)
    else:
        tokenizer = train_tokenizer(text, vocabulary=args.vocabulary, context=args.context)
    tokens, validation = encode(tokenizer, text), encode(tokenizer, held_back)
    if len(validation) < args.context:
        sys.exit(f"--text gives {len(validation)} tokens to validate on, less than a window: give more text")
    print(f"{len(tokens):,} tokens to train on, {len(validation):,} to validate", flush=True)

    sizes = Sizes(
        vocabulary=len(tokenizer),
        layers=args.layers,
        columns=args.columns,
        rows=args.rows,
        experts=args.experts,
        top_k=args.top_k,
        heads=args.heads,
        shared=args.shared,
        context=args.context,
        tied=not args.untied,
        raw_routing=args.raw_routing,
    )
    model = build(moe_config(args.architecture, sizes, aux_loss=args.aux_loss), seed=args.seed)
    trainings = []
    if args.upcycle_steps:
        dense = build(dense_config(sizes), seed=args.seed)
        trainings.append(fit(dense, tokens, validation, steps=args.upcycle_steps, args=args))
        generator = torch.Generator().manual_seed(args.seed)
        upcycle(dense, model, top_k=args.top_k, fresh=args.fresh, generator=generator)
    if args.start:
        trained = AutoModelForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        reshape(trained, model, tokens[: args.batch * args.context].view(args.batch, args.context))
    start = expert_matrices(model)
    trainings.append(fit(model, tokens, validation, steps=args.steps, args=args))

    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    command = shlex.join(["python", os.path.relpath(__file__), *arguments])
    print(write_card(args.out, command, args, sizes, trainings, start, training_tokens=len(tokens)))


if __name__ == "__main__":
    main(sys.argv[1:])
