"""Where products may run in bfloat16: large experts, a float32 fit, hardware that multiplies it."""

from __future__ import annotations

import pytest
import torch

from globe.am.dictionary import low_precision
from globe.am.dictionary.low_precision import curvature_dtype

LARGE, SMALL = (3, 128, 256), (300, 64, 256)


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_is_bfloat16_where_it_pays(
    amx: bool, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_precision, "_multiplies_bfloat16", lambda device: amx)
    pays = amx and shape == LARGE and dtype == torch.float32
    assert curvature_dtype("auto", torch.empty(shape, dtype=dtype)) == (torch.bfloat16 if pays else dtype)


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_what_is_asked_for_is_done(shape: tuple[int, ...]) -> None:
    X = torch.empty(shape)
    assert curvature_dtype("bfloat16", X) == torch.bfloat16
    assert curvature_dtype("same", X) == torch.float32
    assert curvature_dtype("same", X.double()) == torch.float64
