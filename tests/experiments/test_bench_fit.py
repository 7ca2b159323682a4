"""MoBE's own script in `make bench-fit`: what it is given, how its time is counted, and what its losses mean."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from globe.errors import GlobeError
from scripts import load_script

BENCH = Path(__file__).parents[2] / "experiments" / "bench"

# A script with the command line and the lines of MoBE's: each "epoch" keeps one more direction of each expert.
PEER = """
import argparse, json, torch
from safetensors import safe_open
parser = argparse.ArgumentParser()
for name in ("index_path", "base_dir", "save_path", "matrix_type", "activation"):
    parser.add_argument(f"--{name}", required=True)
for name in ("num_matrices", "rows_per_matrix", "cols", "num_epochs", "batch_size", "num_B", "truncation",
             "start_layer", "end_layer"):
    parser.add_argument(f"--{name}", type=int, required=True)
o = parser.parse_args()
print("Using device: cpu")
files = json.load(open(o.index_path))["weight_map"]
W = torch.stack([
    safe_open(f"{o.base_dir}/{files[name]}", "pt").get_tensor(name)
    for one in range(o.num_matrices)
    for name in [f"model.layers.{o.start_layer}.mlp.experts.{one}.{o.matrix_type}.weight"]
]).to(torch.float16)
assert W.shape == (o.num_matrices, o.rows_per_matrix, o.cols) and o.batch_size == o.num_matrices
assert (o.num_B, o.truncation, o.activation) == (3, 4, "tanh") and torch.get_num_threads() == 1
std = W.std()
U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
for epoch in range(o.num_epochs):
    kept = U[..., :epoch + 1] * S[:, None, :epoch + 1] @ V[:, :epoch + 1]
    loss = ((W.float() - kept) / std).square().mean().item()
    print(f"Epoch {200 * (epoch + 1)}, Scaled Loss: {loss:.10f}, Real MSE Loss: 0.0, Real MAE Loss: 0.0")
"""


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(BENCH))  # it imports its siblings
    try:
        return load_script(BENCH / "mobe_script.py")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    file = tmp_path / "train.py"
    file.write_text(PEER)
    return file


def test_losses_become_relative_errors_and_the_time_ends_the_run(bench: ModuleType, peer: Path) -> None:
    W = 0.03 * torch.randn(6, 8, 10, generator=torch.Generator().manual_seed(0)) + 0.02
    history = bench.script_history(peer, W, m=3, r=4, activation="tanh", seconds=0.05, threads=1)
    rounded = W.half().double()
    U, S, V = torch.linalg.svd(rounded, full_matrices=False)
    for k, (_, error) in enumerate(history[:3], start=1):
        kept = (U[..., :k] * S[:, None, :k]) @ V[:, :k]
        assert error == pytest.approx(float((rounded - kept).norm() / rounded.norm()), rel=1e-3)
    seconds = [at for at, _ in history]
    assert seconds == sorted(seconds)
    assert seconds[-1] >= 0.05
    assert all(at <= 0.05 for at in seconds[:-1])


def test_sizes_that_the_script_cannot_start_from_and_a_script_that_breaks(
    bench: ModuleType, peer: Path
) -> None:
    with pytest.raises(GlobeError, match="m=4, 6 experts"):
        bench.script_history(peer, torch.ones(6, 8, 10), m=4, r=4, activation="tanh", seconds=1, threads=1)
    with pytest.raises(GlobeError, match="AssertionError"):
        bench.script_history(peer, torch.ones(6, 8, 10), m=2, r=4, activation="tanh", seconds=1, threads=1)


def test_the_table_has_the_ratio_to_ours_and_no_figure_before_the_first() -> None:
    tables = load_script(BENCH / "fit_tables.py")
    row = {"sizes": "m=3 r=4", "kept": 0.5, "seconds": 20.0}
    cells = {
        "globe tanh": {**row, "history": [(1.0, 0.5), (9.0, 0.4)], "rises": 0},
        "mobe_script tanh": {**row, "history": [(8.0, 0.6), (19.0, 0.5)]},
    }
    lines = tables.table(cells, [5.0, 10.0, 20.0])
    assert lines[-2] == "| mobe_script tanh | m=3 r=4 | 0.5000 |  | 0.6000 | 0.5000 |  |"
    assert lines[-1] == "| mobe_script tanh, ratio to globe | | |  | 1.500 | 1.250 | |"
    assert tables.least(cells, tables.KINDS["MoBE"], 5.0) is None
    assert tables.race(cells, "MoBE", "GloBE, dense", 20.0) == (0.5, 1.0)
