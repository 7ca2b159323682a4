"""Tiny models of every architecture GloBE knows, as transformers itself builds and writes them.

Sizes are all different, so that no transposition or mix-up of axes passes a test: hidden size 24,
intermediate size of an expert 20, 6 experts, 2 per token, shared expert 28 (or 20 where it cannot be
chosen), dense layers 44, vocabulary 37.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

HIDDEN = 24
INTERMEDIATE = 20
EXPERTS = 6
VOCABULARY = 37

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN: dict[str, Any] = {"moe_intermediate_size": INTERMEDIATE, "intermediate_size": 44}
_HEAD: dict[str, Any] = {"head_dim": 8}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 28}
_GROUPED: dict[str, Any] = {"n_group": 1, "topk_group": 1}
_ATTENTION: dict[str, Any] = {"layer_types": ["full_attention", "full_attention"]}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_ROUTED: dict[str, Any] = {"n_routed_experts": EXPERTS, "n_shared_experts": 1}
_FIRST_DENSE: dict[str, Any] = {"first_k_dense_replace": 1}
_SPARSE_LAST: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}
_NUM: dict[str, Any] = {"num_experts": EXPERTS}
_LOCAL: dict[str, Any] = {"num_local_experts": EXPERTS}

TINY: dict[str, dict[str, Any]] = {
    "afmoe": _OWN | _NUM | _HEAD | _ATTENTION | {"num_dense_layers": 1},
    "cohere2_moe": _NUM | _HEAD | _ATTENTION,
    "dbrx": {
        "d_model": HIDDEN,
        "attn_config": {"kv_n_heads": 3, "clip_qkv": 8, "rope_theta": 5e5},
        "ffn_config": {"ffn_hidden_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "deepseek_v2": _OWN | _LATENT | _ROUTED | _GROUPED | _FIRST_DENSE,
    "deepseek_v3": _OWN | _LATENT | _ROUTED | _GROUPED | _FIRST_DENSE,
    "dots1": _OWN | _ROUTED | _HEAD | _GROUPED | _FIRST_DENSE,
    "ernie4_5_moe": _OWN
    | {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone_moe": _OWN
    | _NUM
    | _HEAD
    | _GROUPED
    | _ATTENTION
    | _SPARSE_LAST
    | _FIRST_DENSE
    | {"is_moe_layer": [False, True]},
    "flex_olmo": _NUM,
    "glm4_moe": _OWN | _ROUTED | _HEAD | _GROUPED | _FIRST_DENSE,
    "glm4_moe_lite": _OWN | _LATENT | _ROUTED | _GROUPED | _SPARSE_LAST,
    "gpt_oss": _LOCAL | _HEAD,
    "granitemoe": _LOCAL,
    "granitemoehybrid": _LOCAL
    | {
        "shared_intermediate_size": 28,
        "layer_types": ["attention", "mamba"],
        "mamba_n_heads": 6,
        "mamba_d_head": 8,
    },
    "granitemoeshared": _LOCAL | {"shared_intermediate_size": 28},
    "hunyuan_v1_moe": _NUM | _HEAD | {"moe_topk": 2},
    "jamba": _NUM | {"num_hidden_layers": 4, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "lfm2_moe": _OWN | _NUM | _ATTENTION | {"num_dense_layers": 1},
    "llama4": _LOCAL | _HEAD | {"intermediate_size_mlp": 44, "interleave_moe_layer_step": 1},
    "llama4_text": _LOCAL | _HEAD | {"intermediate_size_mlp": 44, "interleave_moe_layer_step": 1},
    "minimax": _LOCAL,
    "minimax_m2": _LOCAL | _HEAD,
    "mixtral": _LOCAL,
    "nemotron_h": _OWN
    | _HEAD
    | _GROUPED
    | {
        "layers_block_type": ["moe", "attention"],
        "n_routed_experts": EXPERTS,
        "moe_shared_expert_intermediate_size": 28,
    },
    "olmoe": _NUM,
    "phimoe": _LOCAL,
    "qwen2_moe": _OWN | _SHARED | _NUM | {"decoder_sparse_step": 1},
    "qwen3_5_moe": _OWN | _SHARED | _NUM | _HEAD | _DELTA,
    "qwen3_5_moe_text": _OWN | _SHARED | _NUM | _HEAD | _DELTA,
    "qwen3_moe": _OWN | _NUM | _HEAD | {"decoder_sparse_step": 1},
    "qwen3_next": _OWN | _SHARED | _NUM | _HEAD | _DELTA,
    "solar_open": _OWN | _ROUTED | _HEAD,
}
"""Overrides of every `model_type` on top of the common sizes."""

_VISION: dict[str, dict[str, Any]] = {
    "llama4": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 16,
        "image_size": 28,
        "patch_size": 14,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    },
    "qwen3_5_moe": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 16,
    },
}
"""Models of pictures and text: the text part is the MoE."""


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The transformers config of a tiny model."""
    from transformers import AutoConfig

    sizes = _COMMON | TINY[model_type] | overrides
    if model_type in _VISION:
        return AutoConfig.for_model(model_type, text_config=sizes, vision_config=_VISION[model_type])
    return AutoConfig.for_model(model_type, **sizes)


def tiny_model(model_type: str, *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A model with weights large enough that every expert matters, in float32 and in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if model_type in _VISION else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind.from_config(tiny_config(model_type, **overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15, generator=generator)
    return model


def load_tiny(folder: Path, model_type: str, **options: Any) -> torch.nn.Module:
    """What `from_pretrained` makes of a checkpoint that `write_tiny` wrote."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if model_type in _VISION else AutoModelForCausalLM
    return kind.from_pretrained(folder, **options).eval()


def write_tiny(
    model_type: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    upstream: bool = True,
    max_shard_size: int | str = "5GB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a tiny checkpoint with `save_pretrained`, under the upstream names or as it stands in memory."""
    model = tiny_model(model_type, seed=seed, **overrides)
    if dtype is not torch.float32:  # converting at all would lose Llama 4's complex buffer, with a warning
        model = model.to(dtype)
    model.save_pretrained(folder, save_original_format=upstream, max_shard_size=max_shard_size)
    return folder
