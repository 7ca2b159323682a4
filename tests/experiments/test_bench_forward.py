"""`experiments/bench/forward.py` on sizes that take no time, counted by hand; every form computes alike."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scripts import load_script

FILE = Path(__file__).parents[2] / "experiments" / "bench" / "forward.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script(FILE, "bench_forward")


def test_bytes_and_reads_are_counted(bench: ModuleType, tmp_path: Path) -> None:
    n, p, d, m, r = 6, 16, 32, 2, 5
    sizes = [f"--{name}={value}" for name, value in (("experts", n), ("p", p), ("d", d), ("m", m), ("r", r))]
    bench.main([*sizes, "--top-k=3", "--batch", "1", "7", "--calls=2", f"--json={tmp_path / 'a.json'}"])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    found = {(row["variant"].split()[0].strip(","), row["batch"]): row for row in rows}
    assert len(rows) == 2 * 4
    bank = 4 * (n * p * d + 2 * (n * p * r + n * m + m * r * d))
    assert found["dense", 1]["bytes"] == 4 * 3 * n * p * d
    assert found["bank", 7]["bytes"] == bank
    assert found["composed", 1]["bytes"] == bank + 4 * 2 * n * r * d
    assert found["composed", 1]["read"] == pytest.approx((p * d + 2 * r * (p + d)) / (3 * p * d))
    reads = 3 * p * d + 2 * (m * r * d + 3 * p * r)
    assert found["bank", 1]["read"] == pytest.approx(reads / (9 * p * d))
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.parametrize("activation", ["silu", "identity"])
@torch.no_grad()
def test_all_variants_of_the_bank_are_one_function(bench: ModuleType, activation: str) -> None:
    options = bench.arguments(
        ["--experts=6", "--p=16", "--d=32", "--m=2", "--r=5", f"--activation={activation}"]
    )
    dense = bench.dense_experts(options)
    factored = bench.factored_experts(dense, options)
    runs = bench.variants(dense, factored, options)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    picks = torch.rand(9, 6, generator=torch.Generator().manual_seed(1)).topk(4).indices
    out = {name: run(x, picks, torch.full((9, 4), 0.25)) for name, run in runs.items()}
    eager, grouped, composed, bank = out.values()
    torch.testing.assert_close(grouped, eager, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bank, composed, atol=1e-5, rtol=1e-5)
    assert (composed - eager).abs().max() > 0.01
