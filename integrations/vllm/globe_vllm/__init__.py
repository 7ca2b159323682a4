"""vLLM plugin that serves compact GloBE checkpoints with the experts factored in memory.

vLLM calls `register` in every process that it starts. The package needs no part of GloBE itself.
"""

from __future__ import annotations

from typing import Any

PREFIX = "globe_"
"""What the model_type of a compact checkpoint has in front of the original's."""

MODEL_TYPES = (
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)
"""Architectures whose experts are regular in transformers and whose layers vLLM builds from `FusedMoE`.

Run in the tests: qwen2_moe, qwen3_moe, mixtral, olmoe. The others differ from them in attention and router, which the
plugin does not touch.
"""


def register() -> None:
    """Teach vLLM and transformers the compact model types. Safe to call again."""
    from transformers import AutoConfig

    from globe_vllm.loading import divert_factors
    from globe_vllm.quantization import compact_config_class, register_method

    for model_type in MODEL_TYPES:
        AutoConfig.register(PREFIX + model_type, compact_config_class(PREFIX + model_type), exist_ok=True)
    register_method()
    divert_factors()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("globe-vllm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
