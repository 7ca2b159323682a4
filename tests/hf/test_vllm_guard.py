"""What keeps a vLLM without the plugin from running on random experts, and the plugin's list of models."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest

from globe.checkpoint import known_model_types
from globe.errors import CheckpointError
from globe.hf.quantizer import compact_config

PLUGIN = Path(__file__).parents[2] / "integrations" / "vllm" / "globe_vllm" / "__init__.py"
QUANTIZATION = "vllm.model_executor.layers.quantization"
IRREGULAR = {"dbrx", "gpt_oss", "llama4", "llama4_text", "nemotron_h"}


def config() -> dict[str, object]:
    return {"model_type": "globe_mixtral", "quantization_config": {"globe_version": 1, "banks": []}}


def test_a_vllm_that_lacks_the_plugin_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.config", ModuleType("vllm.config"))
    with pytest.raises(CheckpointError, match="pip install globe-vllm"):
        compact_config(config())
    methods = ModuleType(QUANTIZATION)
    methods.QUANTIZATION_METHODS = ["gptq"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, QUANTIZATION, methods)
    with pytest.raises(CheckpointError, match="format=dense"):
        compact_config(config())


def test_with_the_plugin_or_without_vllm_the_configuration_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compact_config(config()).model_type == "mixtral"
    methods = ModuleType(QUANTIZATION)
    methods.QUANTIZATION_METHODS = ["gptq", "globe"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.config", ModuleType("vllm.config"))
    monkeypatch.setitem(sys.modules, QUANTIZATION, methods)
    assert compact_config(config()).model_type == "mixtral"


def test_the_plugin_lists_known_architectures_with_regular_experts() -> None:
    (listed,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(PLUGIN.read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MODEL_TYPES"
    )
    assert set(listed) <= set(known_model_types()) - IRREGULAR
    assert list(listed) == sorted(listed)
