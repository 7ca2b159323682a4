"""Adapters multiplied as integers, against the same as numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_runs import random_bank, write_run
from test_globe_checkpoint import logits, write

from globe.bank.packing import Packed
from globe.bank.rounding import Grid, LevelGrid, round_nearest
from globe.checkpoint import open_checkpoint
from globe.errors import CheckpointError
from globe.hf import load
from globe.hf.footprint import footprint
from globe.hf.packed_product import PackedMatrices, refusal

H, P, R = 5, 19, 70
"""Neither rows nor columns fill the blocks of the kernels."""


def matrices(bits: Sequence[int], *, leveled: bool = False, scaled: bool = True) -> Packed:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(H, P, R, generator=generator)
    grid: Grid | LevelGrid = Grid.of(bits, R, R)
    if leveled:
        levels = torch.arange(H * P).view(H, P) % 7 % 3
        grid = LevelGrid((tuple(bits), (0,) * R, (5,) * R), levels.to(torch.uint8))
    return Packed.of(round_nearest(values, grid), torch.linspace(0.5, 2, R) if scaled else None)


CASES = {
    "nibbles": matrices([(4, 3, 2, 1, 0)[j % 5] for j in range(R)]),
    "four bits": matrices([4] * R, scaled=False),
    "bytes": matrices([(7, 5, 3, 0, 1)[j % 5] for j in range(R)]),
    "rows of levels": matrices([(7, 4, 0)[j % 3] for j in range(R)], leveled=True),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_products_are_those_of_the_numbers(case: str) -> None:
    packed = CASES[case]
    module = PackedMatrices(packed)
    assert module.nibbles == (case in ("nibbles", "four bits"))
    exact = packed.values(torch.float32)
    for row in range(H):
        assert torch.equal(module[row].float(), packed.values(torch.bfloat16)[row].float())
    x = torch.randn(9, R, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = [3, -1, 0, 4]  # of four experts one is dense, one gets no token, and a token is of another device
    found = module(x, torch.tensor([2, 5, 5, 8]), rows)
    expected = torch.zeros(9, P)
    expected[:2], expected[5:8] = x[:2].float() @ exact[3].mT, x[5:8].float() @ exact[4].mT
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.01 * expected.norm()


def test_factors_that_no_kernel_takes_are_named() -> None:
    good = CASES["bytes"]
    assert refusal(good, torch.bfloat16) is None
    assert "bfloat16" in str(refusal(good, torch.float32))
    assert "turned" in str(refusal(replace(good, turned=3), torch.bfloat16))
    assert "8 bits" in str(refusal(matrices([8] * R), torch.bfloat16))
    many = Packed.of(round_nearest(torch.randn(H, P, R), Grid.of(3, R, 32)))
    assert "several scales" in str(refusal(many, torch.bfloat16))


def test_a_loaded_model_keeps_its_adapters_packed(
    tiny: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(str(tiny("qwen2_moe")))
    banks = []
    for family in ("gate", "down"):
        bank = random_bank(checkpoint, [(1, family)], mean="scalar")
        own = Packed.of(round_nearest(bank.adapters, Grid.of(4, bank.r, bank.r)))
        atoms = Packed.of(round_nearest(bank.bank, Grid.of(6, bank.d, 8)))
        banks.append(
            replace(bank, packed={"adapters": own, "bank": atoms}, adapters=own.values(), bank=atoms.values())
        )
    out = write(write_run(tmp_path / "run", banks), tmp_path / "out")
    numbers = load(out, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO):
        packed = load(out, dtype=torch.bfloat16, keep_packed=True)
    assert "1 packed factors stay integers" in caplog.text
    assert "of down are multiplied from the other side" in caplog.text
    experts = packed.model.layers[1].mlp.experts
    assert isinstance(experts.globe_gate.adapters, PackedMatrices)
    assert footprint(packed).total == sum(one.nbytes for one in packed.parameters()) + footprint(packed).cache
    error = (logits(packed).float() - logits(numbers).float()).abs().max()
    assert error < 0.03 * logits(numbers).float().abs().max()
    dense = load(out, dtype=torch.bfloat16, keep_packed=True, dequantize=True)
    one, other = (model.model.layers[1].mlp.experts.gate_up_proj for model in (dense, numbers.dequantize()))
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="not serializable"):
        packed.save_pretrained(tmp_path / "again")
    with pytest.raises(CheckpointError, match="neither"):
        load(tmp_path / "absent", keep_packed=True)
