"""Start a model from a trained one of the same architecture whose form the engines do not take.

Engines multiply fastest, or at all, when p is a multiple of 16 and a head has at least 32 dimensions, and some take it
for granted that the head of the vocabulary is untied and routing weights are not normalised. A trained model that is
otherwise need not be trained anew: its experts gain neurons, groups of its heads become one head each, and a short
training repairs what the change broke.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from architectures import expert_modules


def _joined(rows: Tensor, *, heads: int, group: int) -> Tensor:
    """Return query or key rows (h * k, ...) with every `group` heads of k dimensions made one head.

    Rotary embedding turns dimensions j and j + k/2 of a head by base^(-2j/k). In a head of group * k dimensions the
    pair group * j turns as fast, so there go the pairs of the first head of a group; those of the others follow it,
    at slightly lower frequencies.
    """
    size = rows.shape[0] // heads
    split = rows.view(heads // group, group, 2, size // 2, *rows.shape[1:])
    return split.movedim(1, 3).reshape(rows.shape)


@torch.no_grad()
def _routed_share(model: nn.Module, rows: Tensor, *, top_k: int) -> list[float]:
    """Return per layer the mean probability of the chosen experts together on token rows (batch, context)."""
    logits = model(rows, output_router_logits=True).router_logits
    return [float(one.softmax(-1).topk(top_k, dim=-1).values.sum(-1).mean()) for one in logits]


@torch.no_grad()
def reshape(source: nn.Module, target: nn.Module, rows: Tensor) -> None:
    """Copy `source` into `target`, a float32 model of the same layers, hidden size and vocabulary, in place.

    Neurons that only `target` has keep their fresh random start. A merged head adds the scores of the heads it comes
    from: queries are scaled so that sqrt(k) divides each as before. Where only `source` normalises routing weights,
    down-projections are divided by what the chosen experts' probabilities sum to, on average over the token rows
    `rows` (batch, context).
    """
    shares = [1.0] * len(expert_modules(source))
    if source.config.norm_topk_prob and not target.config.norm_topk_prob:
        shares = _routed_share(source, rows, top_k=source.config.num_experts_per_tok)
    heads, group = source.config.num_attention_heads, 1
    if heads != target.config.num_attention_heads:
        group = heads // target.config.num_attention_heads
    into = target.state_dict()
    for name, value in source.state_dict().items():
        if ".mlp.experts." in name:
            continue
        if group > 1 and ("q_proj" in name or "k_proj" in name):
            value = _joined(value, heads=heads, group=group) * (math.sqrt(group) if "q_proj" in name else 1.0)
        into[name].copy_(value)
    for narrow, wide, share in zip(expert_modules(source), expert_modules(target), shares, strict=True):
        old, new = narrow.down_proj.shape[2], wide.down_proj.shape[2]
        wide.gate_up_proj[:, :old] = narrow.gate_up_proj[:, :old]
        wide.gate_up_proj[:, new : new + old] = narrow.gate_up_proj[:, old:]
        wide.down_proj[:, :, :old] = narrow.down_proj / share
