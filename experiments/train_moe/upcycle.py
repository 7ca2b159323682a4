"""Fine-grained upcycling: a trained dense model becomes the start of a Mixture-of-Experts model.

The recipe of Qwen1.5-MoE in small. The feed-forward layer of the dense model has top_k * p neurons. For every
group of top_k experts its neurons are shuffled anew and cut into top_k experts of p neurons; a share of every
expert's neurons keeps its fresh random start, so that copies can part; down-projections are scaled by top_k,
because routing weights normalised over the top_k chosen experts are about 1 / top_k each.
"""

from __future__ import annotations

import torch
from torch import nn

from architectures import expert_modules


@torch.no_grad()
def upcycle(
    dense: nn.Module, moe: nn.Module, *, top_k: int, fresh: float, generator: torch.Generator
) -> None:
    """Copies `dense` (Qwen2) into `moe` (Qwen2-MoE of the same hidden size and heads), in place.

    `fresh` is the share of neurons that keep their random start, 0 to 1; routers and shared expert do anyway.
    """
    target = moe.state_dict()
    source = dense.state_dict()
    for name, value in source.items():
        if ".mlp." not in name:
            target[name].copy_(value)
    for layer, experts in enumerate(expert_modules(moe)):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (source[f"{mlp}.{which}_proj.weight"] for which in ("gate", "up", "down"))
        n, p = experts.gate_up_proj.shape[0], experts.gate_up_proj.shape[1] // 2
        for first in range(0, n, top_k):
            shuffled = torch.randperm(gate.shape[0], generator=generator)
            for expert, neurons in zip(range(first, min(first + top_k, n)), shuffled.split(p), strict=False):
                kept = torch.randperm(p, generator=generator)[round(fresh * p) :]
                experts.gate_up_proj[expert, kept] = gate[neurons[kept]]
                experts.gate_up_proj[expert, p + kept] = up[neurons[kept]]
                experts.down_proj[expert, :, kept] = top_k * down[:, neurons[kept]]
