"""One pass gives what a whole model gives with one layer and family replaced at a time, for every architecture."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_support import make
from torch import Tensor

from globe.calibration.experts_module import ExpertsView, experts_modules
from globe.calibration.run import prepare
from globe.calibration.sensitivity import sensitivities
from globe.checkpoint import open_checkpoint
from globe.config.calibrate_options import CalibrateConfig
from globe.numerics.divergence import kl_divergence
from tiny_models import TINY, load_tiny


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_sensitivities_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path, model_type)
    layer = checkpoint.moe_layers[-1]
    places = [(layer, family) for family in checkpoint.families(layer)] + [(checkpoint.moe_layers[0], "up")]

    def candidates(layer: int, family: str) -> list[Tensor]:
        weights = checkpoint.read_experts(layer, family).weights
        return [weights, weights.flip(0)] if family == "up" else [weights.flip(0)]

    found = sensitivities(checkpoint, options, candidates, places, tokens=60)
    windows = prepare(checkpoint, CalibrateConfig(**{**vars(options), "tokens": 60})).windows
    assert windows.shape == (4, 13)
    model: Any = load_tiny(checkpoint.folder, model_type)
    name = experts_modules(model)

    def logits(one: Any) -> Tensor:
        with torch.no_grad():
            return one(windows, use_cache=False).logits.flatten(0, 1)

    original = logits(model)
    expected = {(place, number) for place in places for number in range(2 if place[1] == "up" else 1)}
    assert {((one.layer, one.family), one.candidate) for one in found} == expected
    for one in found:
        changed = copy.deepcopy(model)
        view = ExpertsView(changed.get_submodule(name[one.layer]), name[one.layer])
        with view.replaced(one.family, candidates(one.layer, one.family)[one.candidate]):
            want = float(kl_divergence(original, logits(changed)).mean())
        assert one.kl == pytest.approx(want, rel=1e-2, abs=1e-8)
        assert (one.kl > 3e-8) is not (one.family == "up" and one.candidate == 0)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "llama4_text", "nemotron_h"])
def test_matrices_put_into_a_module_are_those_that_files_would_give(model_type: str, tmp_path: Path) -> None:
    checkpoint, _ = make(tmp_path, model_type)
    model: Any = load_tiny(checkpoint.folder, model_type)
    layer, name = next(iter(experts_modules(model).items()))
    view = ExpertsView(model.get_submodule(name), name)
    for family in checkpoint.families(layer):
        weights = checkpoint.read_experts(layer, family).weights
        changed = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
        with view.replaced(family, changed):
            model.save_pretrained(tmp_path / family, save_original_format=False)
        again = open_checkpoint(str(tmp_path / family))
        assert torch.equal(again.read_experts(layer, family).weights, changed)
        model.save_pretrained(tmp_path / f"{family}-back", save_original_format=False)
        back = open_checkpoint(str(tmp_path / f"{family}-back"))
        for one in checkpoint.families(layer):
            assert torch.equal(
                back.read_experts(layer, one).weights, checkpoint.read_experts(layer, one).weights
            )
