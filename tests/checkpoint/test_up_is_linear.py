"""The table's `up` is the linear projection and its `gate` is not: shown on the live model of every architecture.

A checkpoint is rewritten through the table (`locate`, `copy_checkpoint`) with one family of one layer changed;
transformers loads it, and the experts module itself is run. A swap of gate and up, of halves, of experts or of
axes would show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from globe.checkpoint import copy_checkpoint, open_checkpoint
from tiny_models import EXPERTS, HIDDEN, TINY, load_tiny

LLAMA = ("llama4", "llama4_text")
OTHERWISE = ("gpt_oss", "nemotron_h")
"""Experts that are not down(act(gate x) * up x)."""


def experts_module(model: nn.Module, layer: int) -> nn.Module:
    (found,) = [
        module
        for name, module in model.named_modules()
        if f".{layer}." in name and type(module).__name__.endswith("Experts")
    ]
    return found


def outputs(folder: Path, model_type: str, layer: int, hidden: Tensor) -> Tensor:
    """What every expert of the live model makes of the same activations, (experts, tokens, hidden size)."""
    module = experts_module(load_tiny(folder, model_type, dtype=torch.float32), layer)
    tokens = len(hidden)
    with torch.no_grad():
        if model_type in LLAMA:  # all experts at once, every expert its own block of tokens
            return module(hidden.repeat(EXPERTS, 1)).view(EXPERTS, tokens, HIDDEN)
        ones = torch.ones(tokens, 1)
        chosen = [torch.full((tokens, 1), expert) for expert in range(EXPERTS)]
        return torch.stack([module(hidden, index, ones).view(tokens, HIDDEN) for index in chosen])


def scaled(source: Path, out: Path, layer: int, factors: dict[tuple[str, int], float]) -> Path:
    """The checkpoint with the matrices of some (family, expert) multiplied, through the table alone."""
    checkpoint = open_checkpoint(str(source))
    places = [(checkpoint.locate(layer, *which), factor) for which, factor in factors.items()]

    def multiply(name: str, stored: Tensor) -> Tensor:
        for place, factor in places:
            if place.tensor == name:
                place.view(stored).mul_(factor)
        return stored

    names = {place.tensor for place, _ in places}
    copy_checkpoint(source, out, {name: partial(multiply, name) for name in names})
    return out


BOTH_LAYOUTS = ("qwen2_moe", "mixtral", "granitemoe", "jamba", "lfm2_moe", "qwen3_5_moe")


@pytest.mark.parametrize(
    ("model_type", "upstream"),
    [(name, True) for name in TINY if name not in OTHERWISE] + [(name, False) for name in BOTH_LAYOUTS],
)
def test_doubling_up_doubles_an_expert_and_doubling_gate_does_not(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, model_type: str, upstream: bool
) -> None:
    source = tiny_checkpoint(model_type, upstream=upstream)
    layer = open_checkpoint(str(source)).moe_layers[-1]
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    doubled = {("up", 4): 2.0, ("down", 1): 2.0, ("gate", 2): 2.0}
    before = outputs(source, model_type, layer, hidden)
    after = outputs(scaled(source, tmp_path / "out", layer, doubled), model_type, layer, hidden)
    for expert in (0, 3, 5):
        assert torch.equal(after[expert], before[expert])
    for expert in (1, 4):
        assert torch.equal(after[expert], 2 * before[expert])
    assert not torch.allclose(after[2], 2 * before[2], rtol=1e-2)
    assert not torch.allclose(after[2], before[2], rtol=1e-2)


def test_gpt_oss_is_affine_in_up_and_not_in_gate(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Its experts compute (up + 1) gate sigmoid(alpha gate), with biases: equal steps of up give equal steps."""
    source = tiny_checkpoint("gpt_oss")
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    factors = [{("up", 4): k, ("gate", 2): k} for k in (0.0, 1.0, 2.0)]
    folders = [scaled(source, tmp_path / str(k), 1, one) for k, one in enumerate(factors)]
    zero, one, two = (outputs(folder, "gpt_oss", 1, hidden) for folder in folders)
    curvature = ((two - one) - (one - zero)).norm(dim=(1, 2)) / (one - zero).norm(dim=(1, 2))
    assert curvature[4] < 1e-5
    assert curvature[2] > 1e-2
    assert torch.equal(zero[[0, 1, 3, 5]], two[[0, 1, 3, 5]])


@pytest.mark.parametrize("upstream", [True, False], ids=["upstream", "memory"])
def test_nemotron_h_has_one_projection_under_a_squared_relu(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, upstream: bool
) -> None:
    source = tiny_checkpoint("nemotron_h", upstream=upstream)
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    doubled = {("up", 4): 2.0, ("down", 1): 2.0}
    before = outputs(source, "nemotron_h", 0, hidden)
    after = outputs(scaled(source, tmp_path / "out", 0, doubled), "nemotron_h", 0, hidden)
    assert torch.equal(after[4], 4 * before[4])
    assert torch.equal(after[1], 2 * before[1])


@pytest.mark.parametrize("model_type", [name for name in TINY if name not in OTHERWISE])
def test_the_matrices_read_are_those_the_live_model_multiplies_with(
    tiny_checkpoint: Callable[..., Path], model_type: str
) -> None:
    """down^T (act(gate x) * up x) of the matrices read is what the live module gives."""
    source = tiny_checkpoint(model_type)
    checkpoint = open_checkpoint(str(source))
    layer = checkpoint.moe_layers[0]
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(2))
    gate, up, down = (checkpoint.read_experts(layer, family).weights for family in ("gate", "up", "down"))
    by_hand = (nn.functional.silu(hidden @ gate.mT) * (hidden @ up.mT)) @ down
    live = outputs(source, model_type, layer, hidden)
    assert torch.allclose(live, by_hand, rtol=1e-4, atol=1e-5)
