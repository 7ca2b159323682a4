"""The training loop: AdamW on next-token cross-entropy plus a balance loss per router."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from architectures import expert_modules
from measure import perplexity


@dataclass(frozen=True, slots=True)
class Training:
    """What a training run did."""

    steps: int
    tokens: int
    seconds: float
    validation: float
    """perplexity of the kept weights on the validation pieces"""


def windows(tokens: Tensor, *, context: int, batch: int, generator: torch.Generator) -> Callable[[], Tensor]:
    """A source of batches (batch, context): each epoch cuts the text at a new offset and shuffles."""
    waiting: list[Tensor] = []

    def draw() -> Tensor:
        while len(waiting) < batch:
            offset = int(torch.randint(context, (), generator=generator))
            rows = tokens[offset : offset + (len(tokens) - offset) // context * context].view(-1, context)
            waiting.extend(rows[torch.randperm(len(rows), generator=generator)])
        return torch.stack([waiting.pop() for _ in range(batch)])

    return draw


def learning_rate(progress: float, *, peak: float, warmup: float = 0.02, floor: float = 0.05) -> float:
    if progress < warmup:
        return peak * progress / warmup
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))))


def balance_loss(logits: Tensor, *, top_k: int) -> Tensor:
    """n sum_e f_e P_e of one layer (Switch Transformer, eq. 4); `logits` (tokens, n).

    f_e is expert e's share of the routed (token, expert) pairs and P_e its mean probability; 1 when even.
    """
    n = logits.shape[-1]
    chosen = logits.topk(top_k, dim=-1).indices.flatten()
    share = torch.bincount(chosen, minlength=n) / chosen.numel()
    return n * (share * logits.softmax(-1).mean(0)).sum()


def training_loss(model: PreTrainedModel, rows: Tensor, *, aux_loss: float, top_k: int) -> Tensor:
    """Next-token cross-entropy, plus the mean balance loss of the layers for a model with routers.

    The balance loss that transformers computes takes all layers for one, so an expert may starve in one layer
    while the expert of the same number is busy in another: on these models some did.
    """
    out = model(rows, output_router_logits=True) if expert_modules(model) else model(rows)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    if expert_modules(model):
        layers = [balance_loss(logits.flatten(0, -2), top_k=top_k) for logits in out.router_logits]
        loss = loss + aux_loss * torch.stack(layers).mean()
    return loss


def fit(
    model: PreTrainedModel, tokens: Tensor, validation: Tensor, *, steps: int, args: argparse.Namespace
) -> Training:
    """AdamW on the training loss, in place; `model` ends with the weights that validated best.

    The schedule runs to the end of `steps` or of `args.time_limit` seconds, whichever comes first.
    """
    generator = torch.Generator().manual_seed(args.seed)
    draw = windows(tokens, context=args.context, batch=args.batch, generator=generator)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    best, kept, taken, began = math.inf, {}, 0, time.monotonic()
    progress = 0.0
    while progress < 1:
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(progress, peak=args.learning_rate)
        rows = draw()
        loss = training_loss(model, rows, aux_loss=args.aux_loss, top_k=args.top_k)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        taken += 1
        progress = max(taken / steps, (time.monotonic() - began) / args.time_limit)
        if taken % args.evaluate_every == 0 or progress >= 1:
            now = perplexity(model, validation, window=args.context)
            seconds = time.monotonic() - began
            line = f"step {taken:5d}  loss {loss.item():.3f}  validation {now:.2f}  {seconds:.0f} s"
            print(line, flush=True)
            if now < best:
                best, kept = now, {name: value.clone() for name, value in model.state_dict().items()}
    if not kept:
        raise SystemExit(f"the loss was not finite in {taken} steps: lower --learning-rate")
    model.load_state_dict(kept)
    return Training(taken, taken * args.batch * args.context, time.monotonic() - began, best)
