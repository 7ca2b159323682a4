"""The bench of row scales: what is trained, what folds away, and that the divergence falls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from made_runs import random_bank

from globe.bank.file import write_artefact
from globe.checkpoint import open_checkpoint
from globe.hf import load, patch_model
from scripts import load_script
from tiny_models import VOCABULARY


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    script = Path(__file__).parents[2] / "experiments" / "bench" / "recovery.py"
    return load_script(script, "bench_recovery")


def test_scales_train_alone_fold_into_the_adapters_and_help(
    bench: ModuleType, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("qwen2_moe")
    checkpoint = open_checkpoint(str(folder))
    for layer, family in ((0, "up"), (1, "gate")):
        bank = random_bank(checkpoint, [(layer, family)], mean="scalar")
        write_artefact(bank, tmp_path / "banks" / f"layer{layer:03d}.{family}")
    original: Any = load(folder)
    model: Any = patch_model(load(folder), tmp_path, S_cache="all")
    windows = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    start = bench.divergence(original, model, windows)
    ticks = iter(range(10_000))
    monkeypatch.setattr(bench.time, "process_time", lambda: float(next(ticks)))
    with bench.scaled(model) as scales:
        assert [one.shape for one in scales] == [(6, 20, 1), (6, 20, 1)]
        assert bench.divergence(original, model, windows) == pytest.approx(start, rel=1e-6)
        assert bench.distil(original, model, windows, scales, seconds=30, rate=3e-2) == 29
        trained = bench.divergence(original, model, windows)
    assert trained < 0.9 * start
    assert bench.divergence(original, model, windows) == pytest.approx(trained, rel=1e-5)
    after = model.state_dict()
    assert set(after) == set(before)
    changed = {name for name, one in after.items() if not torch.equal(one, before[name])}
    assert len(changed) == 2
    assert all(name.endswith("adapters") for name in changed)
