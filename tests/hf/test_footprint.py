"""Bytes that a model holds, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_runs import ATOMS, RANK, random_bank, random_run, write_run

from globe.checkpoint import open_checkpoint
from globe.hf import patch_model
from globe.hf.footprint import footprint
from tiny_models import EXPERTS, HIDDEN, INTERMEDIATE, load_tiny

MATRIX = EXPERTS * INTERMEDIATE * HIDDEN * 4
"""Bytes of one family of one layer in float32."""


@pytest.mark.parametrize("S_cache", [0, 2, "all"])
def test_every_byte_is_counted_once(S_cache: int | str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_tiny(tiny("olmoe"), "olmoe")
    before = footprint(model)
    assert (before.dense, before.factors, before.cache) == (2 * 3 * MATRIX, 0, 0)
    assert before.total == sum(one.nbytes for one in model.parameters())

    model = patch_model(model, random_run(tiny("olmoe"), tmp_path / "run", ["up"]), S_cache=S_cache)
    factors = EXPERTS * INTERMEDIATE * RANK + EXPERTS * ATOMS + ATOMS * RANK * HIDDEN
    after = footprint(model)
    assert (after.dense, after.factors, after.cache) == (2 * 2 * MATRIX, 2 * 4 * factors, 0)
    assert after.rest == before.rest
    with torch.no_grad():
        model(input_ids=torch.arange(1, 31)[None], use_cache=False)  # enough tokens to hit every expert
    held = EXPERTS if S_cache == "all" else S_cache
    assert footprint(model).cache == 2 * held * RANK * HIDDEN * 4
    assert footprint(model).total == after.total + footprint(model).cache


def test_a_shared_bank_is_counted_once(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    bank = random_bank(open_checkpoint(str(tiny("olmoe"))), [(0, "up"), (1, "up"), (1, "gate")])
    model = patch_model(load_tiny(tiny("olmoe"), "olmoe"), write_run(tmp_path / "run", [bank]))
    assert footprint(model).factors == 4 * bank.kept_parameters
    assert footprint(model).dense == 3 * MATRIX
