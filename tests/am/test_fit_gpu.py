"""The same fit on an accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import configured, fitted, plant, sizes_of

from globe.config.choices import Dictionary
from globe.config.schema import InitConfig


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, {}),
        ({"activation": "silu", "lam": 1.0}, {"atom_rank": 2}),
        ({"dictionary": Dictionary.mod}, {}),
        ({}, {"target_support": 2}),
    ],
    ids=["linear", "low rank, silu", "mod", "sparse"],
)
def test_a_fit_on_cuda_agrees_with_the_cpu(options: dict[str, Any], more: dict[str, Any]) -> None:
    X = plant(m=5, noise=0.3, dtype=torch.float32).X
    config = configured(steps=8, cg_iterations=5, init=InitConfig(), **options)
    here, _ = fitted(X, sizes_of(X, 5, **more), config)
    there, records = fitted(X.cuda(), sizes_of(X, 5, **more), config)
    assert there.factors.bank.is_cuda
    assert there.factors.codes.is_cuda
    assert there.relfrob == pytest.approx(here.relfrob, rel=1e-3)
    assert there.relfrob_start == pytest.approx(here.relfrob_start, rel=1e-3)
    assert records[0].objective == pytest.approx(
        fitted(X, sizes_of(X, 5, **more), config)[1][0].objective, rel=1e-3
    )
