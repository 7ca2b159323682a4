"""Where products may run in bfloat16: large experts, a float32 fit, hardware that multiplies it."""

from __future__ import annotations

import pytest
import torch
from planted import configured, fitted, plant, sizes_of

from globe.am.dictionary import low_precision
from globe.am.dictionary.low_precision import curvature_dtype
from globe.am.records import FitState
from globe.config.choices import CurvatureDtype

LARGE, SMALL = (3, 128, 256), (300, 64, 256)


@pytest.fixture(autouse=True)
def _curvature() -> None:
    """Nothing is forced here, in the place of the fixture that forces it: the choice is what these tests are about."""


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_is_bfloat16_where_it_pays(
    units: bool, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_precision, "_multiplies_bfloat16", lambda device: units)
    pays = units and shape == LARGE and dtype == torch.float32
    assert curvature_dtype("auto", torch.empty(shape, dtype=dtype)) == (torch.bfloat16 if pays else dtype)


@pytest.mark.parametrize(("amx", "avx512"), [(True, False), (False, True), (False, False)])
def test_either_set_of_instructions_will_do(amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    wanted = torch.bfloat16 if amx or avx512 else torch.float32
    assert curvature_dtype("auto", torch.empty(LARGE)) == wanted


@pytest.mark.parametrize("begun", [True, False])
def test_a_fit_goes_on_with_the_products_it_began_with(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state from another machine: what that one multiplied in decides, not what this one would take."""
    X = plant(noise=0.2, dtype=torch.float32).X
    monkeypatch.setattr(low_precision, "_SMALL", 1)
    monkeypatch.setattr(low_precision, "_multiplies_bfloat16", lambda device: begun)
    config = configured(steps=6, checkpoint_every=0.0, curvature_dtype=CurvatureDtype.auto)
    states: list[FitState] = []
    wanted, _ = fitted(X, sizes_of(X), config, on_checkpoint=states.append)
    monkeypatch.setattr(low_precision, "_multiplies_bfloat16", lambda device: not begun)
    found, _ = fitted(X, sizes_of(X), config, resume=states[1])
    assert torch.equal(found.factors.bank, wanted.factors.bank)
    other, _ = fitted(X, sizes_of(X), config)
    assert not torch.equal(other.factors.bank, wanted.factors.bank)


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_what_is_asked_for_is_done(shape: tuple[int, ...]) -> None:
    X = torch.empty(shape)
    assert curvature_dtype("bfloat16", X) == torch.bfloat16
    assert curvature_dtype("same", X) == torch.float32
    assert curvature_dtype("same", X.double()) == torch.float64
