"""Errors of MoE blocks on the original's own inputs, planted and found again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from globe.calibration.experts_module import experts_modules
from globe.calibration.text import Tokens
from globe.evaluation.activation_error import LayerError, activation_errors
from globe.evaluation.text import Window
from globe.hf import load, patch_model
from tiny_models import INTERMEDIATE

CPU = torch.device("cpu")
WINDOWS = (Window(0, 12, 11), Window(12, 24, 11), Window(24, 31, 6))


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    ids = torch.randint(257, (31,), generator=torch.Generator().manual_seed(4))
    return Tokens(ids, torch.ones(31, dtype=torch.int64))


def errors(original: Any, compressed: nn.Module, tokens: Tokens, batch: int = 2) -> tuple[LayerError, ...]:
    return activation_errors(original, compressed, tokens, WINDOWS, batch=batch, device=CPU)


@torch.no_grad()
def scale_up(model: Any, layer: int, factor: float) -> None:
    fused = model.get_submodule(experts_modules(model)[layer]).gate_up_proj
    fused[:, INTERMEDIATE:] *= factor


def test_a_doubled_up_doubles_its_experts_and_touches_no_other_layer(model: Any, tokens: Tokens) -> None:
    """Later layers of the changed model see other inputs, but they are measured on the original's."""
    doubled = copy.deepcopy(model)
    scale_up(doubled, 0, 2.0)
    first, second = errors(model, doubled, tokens)
    assert (first.layer, second.layer) == (0, 1)
    assert first.experts == pytest.approx(1.0, rel=1e-5)
    assert 0 < first.block != pytest.approx(1.0, rel=1e-3)  # the shared expert is in the block, and unchanged
    assert (second.block, second.experts) == (0.0, 0.0)


def test_the_errors_are_those_of_outputs_kept_and_compared(model: Any, other: Any, tokens: Tokens) -> None:
    found = errors(model, other, tokens)
    for layer, name in experts_modules(model).items():
        block_name = name.rpartition(".")[0]
        inputs: list[Tensor] = []
        handle = model.get_submodule(block_name).register_forward_pre_hook(
            lambda module, args, kept=inputs: kept.append(args[0])
        )
        with torch.no_grad():
            for window in WINDOWS:
                model(tokens.ids[None, window.start : window.stop])
            handle.remove()
            outputs = [
                torch.cat([one.get_submodule(block_name)(x).flatten(0, 1) for x in inputs]).double()
                for one in (model, other)
            ]
        expected = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
        assert found[layer].block == pytest.approx(expected, rel=1e-5)
        assert found[layer].block > 0.01


def test_batches_change_nothing(model: Any, other: Any, tokens: Tokens) -> None:
    for one, two in zip(errors(model, other, tokens, 1), errors(model, other, tokens, 3), strict=True):
        assert one.block == pytest.approx(two.block, rel=1e-5)
        assert one.experts == pytest.approx(two.experts, rel=1e-5)


def test_hooks_are_gone_afterwards_and_after_an_error(model: Any, other: Any, tokens: Tokens) -> None:
    errors(model, other, tokens)
    broken = Tokens(torch.full((31,), 10_000), tokens.bytes)
    with pytest.raises(IndexError):
        errors(model, other, broken)
    for one in (model, other):
        assert not any(module._forward_hooks for module in one.modules())


def test_a_factored_model_is_measured_where_it_is_factored(
    model: Any, checkpoint_of: Callable[..., Path], lossy_run: Path, tokens: Tokens
) -> None:
    """The run has up of layer 0 and gate of layer 1; dense and factored agree on what that costs."""
    factored = patch_model(load(checkpoint_of()), lossy_run)
    dense = patch_model(load(checkpoint_of()), lossy_run, dense=True)
    for one, two in zip(errors(model, factored, tokens), errors(model, dense, tokens), strict=True):
        assert one.experts == pytest.approx(two.experts, rel=1e-4)
        assert one.experts > 0.1


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe", "llama4_text", "mixtral", "nemotron_h"])
def test_blocks_of_every_form_can_be_run_again(
    model_type: str, checkpoint_of: Callable[..., Path], tokens: Tokens
) -> None:
    """Irregular experts, outputs that are tuples, layers of another kind between."""
    model = load(checkpoint_of(model_type))
    changed = copy.deepcopy(model)
    layer, name = max(experts_modules(changed).items())
    with torch.no_grad():
        changed.get_submodule(name).down_proj.mul_(3.0)
    found = {one.layer: one for one in errors(model, changed, tokens)}
    assert set(found) == set(experts_modules(model))
    if model_type != "gpt_oss":  # its down projection has a bias, which was not scaled
        assert found.pop(layer).experts == pytest.approx(2.0, rel=1e-4)
    # of equal weights, but not of equal bits: how a product is rounded may depend on where in memory it lies
    assert all(one.block < 1e-6 for one in found.values() if one.layer != layer)
