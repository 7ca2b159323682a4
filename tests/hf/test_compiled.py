"""`torch.compile` and generation with a static cache: one graph without breaks, and the results of plain calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import random_bank, write_run
from torch import nn
from transformers import CompileConfig

from globe.checkpoint import open_checkpoint
from globe.hf import atoms, experts, patch_model, products, projection
from globe.hf.quantizer import set_cache
from tiny_models import load_tiny

IDS = torch.arange(3, 25).view(2, 11)


def compact(source: Path, folder: Path, *, lam: float = 0.6) -> nn.Module:
    """Gate of layer 0 and all three families of some experts of layer 1, with low-rank atoms and a mean."""
    checkpoint = open_checkpoint(str(source))
    banks = [
        random_bank(checkpoint, [(0, "gate")], lam=lam, mean="scalar"),
        random_bank(checkpoint, [(1, "up"), (1, "down")], experts=[0, 4, 5], low_rank=True, lam=lam),
    ]
    return patch_model(load_tiny(source, "qwen2_moe"), write_run(folder / "run", banks)).eval()


@pytest.fixture(autouse=True)
def _without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the checks of shapes off what is captured: they are code that `torch.compile` can't follow."""
    torch.compiler.reset()
    for module in (atoms, experts, products, projection):
        own = [
            one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == module.__name__
        ]
        for holder in (module, *own):
            for name, value in list(vars(holder).items()):
                constant = getattr(value, "_dynamo_marked_constant", False)
                if inspect.isfunction(value) and hasattr(value, "__wrapped__") and not constant:
                    monkeypatch.setattr(holder, name, inspect.unwrap(value))


@pytest.mark.parametrize(
    ("S_cache", "lam"),
    [
        ("all", 0.6),
        (0, 0.6),
        pytest.param(2, 0.6, marks=pytest.mark.slow),
        pytest.param(0, 0.0, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_the_model_is_captured_whole(
    S_cache: int | str, lam: float, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model: Any = compact(tiny("qwen2_moe"), tmp_path, lam=lam)
    set_cache(model, S_cache)
    captured = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = captured(input_ids=IDS, use_cache=False).logits  # before any plain call has composed a basis
    torch.testing.assert_close(found, model(input_ids=IDS, use_cache=False).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_captured_model_uses_kept_bases_and_sees_other_factors(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model: Any = compact(tiny("qwen2_moe"), tmp_path)
    captured = torch.compile(model, backend="aot_eager", fullgraph=True)
    captured(input_ids=IDS, use_cache=False)
    gate = model.model.layers[0].mlp.experts.globe_gate
    assert gate.composed_bytes == 6 * 13 * 24 * 4
    gate.codes.mul_(2)
    set_cache(model, "all")
    changed = captured(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(changed, model(input_ids=IDS, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def test_generation_with_a_static_cache_compiles_and_writes_the_same(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model: Any = compact(tiny("qwen2_moe"), tmp_path)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    plain = model.generate(IDS, attention_mask=mask, **options)
    seen: list[int] = []

    def counting(graph: Any, inputs: Any, **options: Any) -> Any:
        seen.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    compiled = CompileConfig(backend=counting, fullgraph=True)
    compiled._compile_all_devices = True
    found = model.generate(
        IDS, attention_mask=mask, cache_implementation="static", compile_config=compiled, **options
    )
    assert torch.equal(found, plain)
    assert len(seen) == 1  # of one decoding step, for all of them
