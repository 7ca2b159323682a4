"""Small Mixture-of-Experts models by architecture: the same sizes under each architecture's own names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a model; rows and columns are p and d of an expert matrix."""

    vocabulary: int
    layers: int
    columns: int
    rows: int
    experts: int
    top_k: int
    heads: int
    shared: int
    context: int
    tied: bool = True
    raw_routing: bool = False


# architecture -> (key of the number of experts, key of the rows of an expert, keys with values of their own).
# Routing weights are normalised over the chosen experts wherever the architecture leaves the choice, so that
# the routed experts carry the layer from the first step on.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_moe": ("num_experts", "moe_intermediate_size", {"decoder_sparse_step": 1, "norm_topk_prob": True}),
    "qwen3_moe": ("num_experts", "moe_intermediate_size", {"decoder_sparse_step": 1, "norm_topk_prob": True}),
    "olmoe": ("num_experts", "intermediate_size", {"norm_topk_prob": True}),
    "mixtral": ("num_local_experts", "intermediate_size", {"sliding_window": None}),
    "granitemoe": ("num_local_experts", "intermediate_size", {}),
}


def _common(sizes: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.columns,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "head_dim": sizes.columns // sizes.heads,
        "max_position_embeddings": 4 * sizes.context,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def moe_config(architecture: str, sizes: Sizes, *, aux_loss: float) -> PretrainedConfig:
    """The configuration of a Mixture-of-Experts model in which every layer has routed experts."""
    experts, rows, fixed = ARCHITECTURES[architecture]
    values = _common(sizes) | {"num_experts_per_tok": sizes.top_k, "router_aux_loss_coef": aux_loss}
    if sizes.raw_routing:
        fixed = fixed | {"norm_topk_prob": False}
    if architecture == "qwen2_moe":
        values["shared_expert_intermediate_size"] = sizes.shared
        values["intermediate_size"] = sizes.top_k * sizes.rows  # of dense layers, which the model has none of
    return AutoConfig.for_model(architecture, **values, **fixed, **{experts: sizes.experts, rows: sizes.rows})


def dense_config(sizes: Sizes) -> PretrainedConfig:
    """The dense Qwen2 whose feed-forward layer is as wide as the chosen experts of a token together."""
    return AutoConfig.for_model("qwen2", **_common(sizes), intermediate_size=sizes.top_k * sizes.rows)


def build(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """A float32 model with random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """Per layer the module of the routed experts: `gate_up_proj` (n, 2p, d) and `down_proj` (n, d, p)."""
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


def expert_matrices(model: nn.Module) -> list[dict[str, Tensor]]:
    """Per layer copies of the families gate and up (n, p, d); gate is the first half of the fused rows."""
    layers = []
    for module in expert_modules(model):
        gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
        layers.append({"gate": gate.clone(), "up": up.clone()})
    return layers
