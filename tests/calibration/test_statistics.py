"""Statistics of every architecture against a slow reference that works token by token on the checkpoint's matrices."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calibration_support import collect
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from globe.calibration.collect import MomentSums, buffered_rows
from globe.calibration.experts_module import ExpertsView, experts_modules
from globe.calibration.plan import LayerSize
from globe.calibration.statistics import (
    LayerStatistics,
    SecondMoments,
    is_complete,
    read_statistics,
    write_statistics,
)
from globe.checkpoint import Checkpoint, open_checkpoint
from globe.errors import ArtefactError, CheckpointError
from tiny_models import EXPERTS, HIDDEN, INTERMEDIATE, TINY, VOCABULARY, load_tiny, write_tiny

WINDOWS = torch.randint(3, VOCABULARY, (5, 11), generator=torch.Generator().manual_seed(3))


class Reference:
    """Sums over tokens of one layer, from the matrices of the files and explicit formulas of each activation."""

    def __init__(self, checkpoint: Checkpoint, layer: int, module: Any) -> None:
        families = checkpoint.families(layer)
        self.weights = {one: checkpoint.read_experts(layer, one).weights.double() for one in families}
        self.module = module
        n, d, p = EXPERTS, HIDDEN, INTERMEDIATE
        self.C, self.H = torch.zeros(n, d, d).double(), torch.zeros(n, p, p).double()
        self.counts, self.gate2, self.reap = (torch.zeros(n).double() for _ in range(3))
        self.up, self.gate = (torch.zeros(n, p).double() for _ in range(2))

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = [*args, *kwargs.values()]
        if len(tensors) == 1:  # Llama 4
            pairs = [
                (expert, row, 1.0)
                for expert, rows in enumerate(tensors[0].reshape(EXPERTS, -1, HIDDEN))
                for row in rows
                if row.abs().sum() > 0
            ]
        else:
            x, index, weights = tensors
            pairs = [
                (int(expert), row, float(weight))
                for row, experts, gates in zip(x.reshape(-1, HIDDEN), index, weights, strict=True)
                for expert, weight in zip(experts, gates, strict=True)
            ]
        total = torch.zeros(HIDDEN).double()
        for expert, row, weight in pairs:
            total += self.add(expert, row.double(), weight)
        torch.testing.assert_close(total, output.double().reshape(-1, HIDDEN).sum(0), rtol=1e-4, atol=1e-4)

    def add(self, e: int, x: Tensor, g: float) -> Tensor:
        up = self.weights["up"][e] @ x
        down = self.weights["down"][e].T
        bias = torch.zeros(HIDDEN).double()
        if type(self.module).__name__ == "GptOssExperts":
            both = self.module.gate_up_proj_bias[e].double()
            gate = (self.weights["gate"][e] @ x + both[::2]).clamp(max=self.module.limit)
            up = (up + both[1::2]).clamp(-self.module.limit, self.module.limit) + 1
            bias = self.module.down_proj_bias[e].double()
            act = gate * torch.sigmoid(self.module.alpha * gate)
            s = torch.sigmoid(self.module.alpha * gate)
            by_up, by_gate = act, up * (s + self.module.alpha * gate * s * (1 - s))
            h = up * act
        elif "gate" in self.weights:
            gate = self.weights["gate"][e] @ x
            s = torch.sigmoid(gate)
            by_up, by_gate = F.silu(gate), up * (s + gate * s * (1 - s))
            h = up * F.silu(gate)
        else:  # relu squared
            h = up.clamp(min=0).square()
            by_up, by_gate = 2 * up.clamp(min=0), torch.zeros_like(up)
        norms = down.square().sum(0)
        out = down @ h + bias
        self.C[e] += g**2 * torch.outer(x, x)
        self.H[e] += g**2 * torch.outer(h, h)
        self.counts[e] += 1
        self.gate2[e] += g**2
        self.up[e] += g**2 * by_up.square() * norms
        self.gate[e] += g**2 * by_gate.square() * norms
        self.reap[e] += g * out.norm()
        return g * out


def assert_near(got: Tensor, want: Tensor) -> None:
    """Assert that float32 sums are those of the reference; what cancels is as exact as the largest of them."""
    torch.testing.assert_close(got.to(want), want, rtol=2e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_statistics_equal_those_of_a_slow_reference(model_type: str, tmp_path: Path) -> None:
    folder = write_tiny(model_type, tmp_path / "model")
    model: Any = load_tiny(folder, model_type)
    checkpoint = open_checkpoint(str(folder))
    names = experts_modules(model)
    assert tuple(sorted(names)) == checkpoint.moe_layers
    found = collect(model, WINDOWS, batch=2)
    references = {
        layer: Reference(checkpoint, layer, model.get_submodule(name)) for layer, name in names.items()
    }
    for layer, name in names.items():
        model.get_submodule(name).register_forward_hook(references[layer], with_kwargs=True)
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    assert set(found) == set(names)
    for layer, want in references.items():
        got = found[layer]
        assert got.counts.tolist() == want.counts.tolist()
        assert want.counts.sum() > 0
        weight = torch.where(want.gate2 > 0, 1 / want.gate2, 0.0)
        assert_near(got.gate2, want.gate2)
        assert_near(got.C, want.C * weight[:, None, None])
        assert_near(got.H, want.H * weight[:, None, None])
        assert_near(got.rows_up, want.up * weight[:, None])
        assert_near(got.reap, want.reap)
        if "gate" in checkpoint.families(layer):
            assert got.rows_gate is not None
            assert_near(got.rows_gate, want.gate * weight[:, None])
        else:
            assert got.rows_gate is None


@pytest.mark.parametrize("rank", [None, 5, 11])
def test_sums_take_the_memory_that_is_told_however_many_rows_come(
    rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[int] = []
    decompose = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda one: (sides.append(len(one)), decompose(one))[1])
    size, held, means = LayerSize(n=3, p=19, d=43), 0, 0
    for q in (size.p, size.d):
        k = rank if rank is not None and 2 * rank < q else None
        sums = MomentSums(size.n, q, rank=k)
        for rows in (7, 900, 30):
            sums.add(1, torch.randn(rows, q))
        held += sum(one.nbytes for one in vars(sums).values() if isinstance(one, Tensor))
        sums.complete()
        assert max(sides, default=0) <= (k or 0) + buffered_rows(k)
        found = sums.finish(torch.ones(size.n).double())
        means += sum(one.nbytes for one in (found.matrix, found.factor, found.diagonal) if one is not None)
        assert not [one for one in vars(sums).values() if isinstance(one, Tensor) and one.dim() > 2]
    work = 4 * size.d**2 if rank is None else 16 * size.d * (64 + rank) + 32 * (64 + rank) ** 2
    assert held <= size.growing(rank) <= held + work
    assert size.stored(rank) == means + 8 * size.n * size.p


def test_rows_of_low_rank_are_found_exactly_and_the_diagonal_always_is() -> None:
    generator = torch.Generator().manual_seed(0)
    n, q, rank = 3, 19, 5
    flat = torch.randn(n, 700, rank, generator=generator) @ torch.randn(n, rank, q, generator=generator)
    full = torch.randn(n, 700, q, generator=generator)
    for rows, exact in ((flat, True), (full, False)):
        sums, whole = MomentSums(n, q, rank=rank), MomentSums(n, q)
        for expert in range(n):
            for part in rows[expert].split(60):
                sums.add(expert, part)
                whole.add(expert, part)
        weights = torch.tensor([700.0, 350.0, 70.0]).double()
        got, want = sums.finish(weights), whole.finish(weights)
        assert got.factor is not None
        assert got.factor.shape == (n, q, rank)
        expected = rows.double().mT @ rows.double() / weights[:, None, None]
        torch.testing.assert_close(want.dense().double(), expected, rtol=1e-4, atol=1e-3)
        dense = got.dense()
        torch.testing.assert_close(
            dense.diagonal(dim1=1, dim2=2), expected.float().diagonal(dim1=1, dim2=2), rtol=1e-4, atol=1e-4
        )
        error = float((dense - expected.float()).norm() / expected.norm())
        assert (error < 1e-3) is exact
        assert error < 0.5
        torch.testing.assert_close(got.dense([2, 0]), dense[[2, 0]])


def made(n: int = 3, p: int = 5, d: int = 7) -> LayerStatistics:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, n, p, generator=generator)
    return LayerStatistics(
        layer=4,
        inputs=SecondMoments(matrix=torch.randn(n, d, d, generator=generator)),
        inner=SecondMoments(
            factor=torch.randn(n, p, 2, generator=generator), diagonal=torch.rand(n, p, generator=generator)
        ),
        counts=torch.arange(n).double(),
        gate2=torch.arange(n).double() / 2,
        rows_up=rows[0],
        rows_gate=rows[1],
        reap=torch.rand(n, generator=generator).double(),
    )


@pytest.mark.parametrize("gated", [True, False])
def test_a_file_gives_back_what_was_written(gated: bool, tmp_path: Path) -> None:
    statistics = made() if gated else replace(made(), rows_gate=None)
    path = tmp_path / "deep" / "layer.safetensors"
    write_statistics(statistics, path, key="abc")
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    again = read_statistics(path, key="abc")
    assert again.layer == 4
    assert torch.equal(again.C, statistics.C)
    assert torch.equal(again.H, statistics.H)
    for name in ("counts", "gate2", "rows_up", "reap"):
        assert torch.equal(getattr(again, name), getattr(statistics, name))
    assert (again.rows_gate is None) is not gated


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    with pytest.raises(ArtefactError, match="can't be read"):
        read_statistics(path)
    write_statistics(made(), path, key="abc")
    with pytest.raises(ArtefactError, match="another model"):
        read_statistics(path, key="xyz")
    for name, value in {"gate2": torch.zeros(2).double(), "rows_up": torch.full((3, 5), torch.nan)}.items():
        with safe_open(path, framework="pt") as file:
            tensors = {one: file.get_tensor(one) for one in file.keys()} | {name: value}  # noqa: SIM118
            metadata = file.metadata()
        other = tmp_path / "other.safetensors"
        save_file(tensors, other, metadata=metadata)
        with pytest.raises(ArtefactError, match="damaged"):
            read_statistics(other)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtefactError, match="can't be read"):
        read_statistics(path)
    path.unlink()
    os.mkfifo(path)  # which the library would wait for
    assert not is_complete(path, key="abc")
    with pytest.raises(ArtefactError, match="not a regular file"):
        read_statistics(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"C.matrix": torch.zeros(3)},
        {"C.matrix": torch.zeros(0, 7, 7)},
        {"C.matrix": torch.zeros(3, 7, 4)},
        {"counts": torch.zeros(3, dtype=torch.int64)},
        {"H.diagonal": None},
    ],
)
def test_tensors_of_other_sizes_and_kinds_are_refused(
    tmp_path: Path, changed: dict[str, torch.Tensor | None]
) -> None:
    path = tmp_path / "layer.safetensors"
    write_statistics(made(), path)
    with safe_open(path, framework="pt") as file:
        tensors = {one: file.get_tensor(one) for one in file.keys()} | changed  # noqa: SIM118
        metadata = file.metadata()
    assert set(changed) & set(tensors)
    save_file({name: one for name, one in tensors.items() if one is not None}, path, metadata=metadata)
    with pytest.raises(ArtefactError, match="damaged"):
        read_statistics(path)


def test_experts_that_are_not_fused_are_refused() -> None:
    module = torch.nn.Module()
    module.w1 = torch.nn.Linear(3, 5)
    with pytest.raises(CheckpointError, match="no fused gate_up_proj"):
        ExpertsView(module, "model.layers.0.mlp.experts")
