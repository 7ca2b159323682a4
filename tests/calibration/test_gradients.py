"""What an error of a layer's output costs: planted, refused with reasons, damaged, and not asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_support import make
from safetensors.torch import load_file, save_file

from globe.calibration import plan as plan_module
from globe.calibration.gradients import FOLDER
from globe.calibration.run import calibrate, prepare
from globe.calibration.statistics import EVEN, OutputWeights
from globe.checkpoint import open_checkpoint
from globe.errors import ArtefactError, CheckpointError, ConfigError


def changed(checkpoint: Any, change: Any) -> Any:
    """Return the checkpoint with some of its tensors changed in place."""
    file = checkpoint.folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return open_checkpoint(str(checkpoint.folder))


def test_a_direction_that_the_output_layer_ignores_gets_no_weight(tmp_path: Path) -> None:
    """Nothing but unit 5 of expert 2 in the last layer writes in direction 7, and no logit hangs on it."""
    checkpoint, options = make(tmp_path, tie_word_embeddings=False)

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        for name, one in tensors.items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                one[:, 7] = 0
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                one[7] = 0
        name = next(one for one in tensors if "layers.1" in one and "experts.2.down" in one)
        tensors[name][:, 5] = 0
        tensors[name][7, 5] = 0.01

    output = calibrate(changed(checkpoint, plant), options).layer(1).output
    assert output is not None
    mean = output.mean
    assert float(output.F.diagonal()[7]) < 1e-6 * mean
    assert float(output.down[2, 5]) < 1e-6 * mean
    others = output.down[torch.arange(6) != 2]
    assert float(others.min()) > 1e-2 * mean
    assert float(output.of_rows[2, 5]) == pytest.approx(mean * EVEN / (1 + EVEN), rel=1e-4)


def test_every_direction_keeps_a_share_of_the_mean() -> None:
    F = torch.diag(torch.tensor([6.0, 0.0, 3.0]))
    output = OutputWeights(F, torch.tensor([[6.0, 0.0]]))
    torch.testing.assert_close(
        output.matrix.diagonal(), (torch.tensor([6.0, 0, 3]).double() + 3 * EVEN) / (1 + EVEN)
    )
    torch.testing.assert_close(output.of_rows, (torch.tensor([[6.0, 0.0]]) + 3 * EVEN) / (1 + EVEN))
    assert float(output.matrix.trace()) == pytest.approx(9)


def test_no_gradients_are_taken_where_none_are_asked_for(tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path)
    options.gradient_tokens = 26
    taken = calibrate(checkpoint, options)
    assert "gradients on 26 tokens" in prepare(checkpoint, options).plan.sentence
    options.gradient_tokens, options.out = 0, str(tmp_path / "without")
    assert "gradients" not in prepare(checkpoint, options).plan.sentence
    without = calibrate(checkpoint, options)
    assert without.key != taken.key
    assert without.layer(1).output is None
    assert not list(without.folder.glob("output-*"))
    s = taken.layer(1)
    assert s.output is not None
    torch.testing.assert_close(s.rows("up"), s.rows_up * s.output.of_rows)
    assert torch.equal(without.layer(1).rows("gate"), s.rows_gate)


def test_files_that_are_lost_or_damaged_are_taken_again(tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path)
    calibration = calibrate(checkpoint, options)
    path, bytes_ = calibration.output_file(0), calibration.output_file(0).read_bytes()
    path.write_bytes(bytes_[:-9])
    assert not calibration.has_output(0)
    with pytest.raises(ArtefactError, match="calibrate again"):
        calibration.layer(0)
    calibrate(checkpoint, options, layers=[1])  # which hangs on the other one
    assert path.read_bytes() != bytes_
    calibrate(checkpoint, options)
    assert path.read_bytes() == bytes_
    assert not (calibration.folder / FOLDER).exists()


def test_probabilities_that_are_not_finite_are_a_sentence(tmp_path: Path) -> None:
    checkpoint, options = make(tmp_path)
    broken = changed(checkpoint, lambda tensors: tensors["lm_head.weight"][3].fill_(torch.inf))
    with pytest.raises(CheckpointError, match=r"not finite: give .*calibrate\.gradient_tokens=0"):
        calibrate(broken, options)


def test_gradients_that_do_not_fit_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, options = make(tmp_path)
    monkeypatch.setattr(plan_module, "_vocabulary", lambda checkpoint: 10**6)
    options.memory = 0.1
    with pytest.raises(
        ConfigError, match=r"too little for gradients: give at least 0\.\d+, or calibrate\.grad"
    ):
        prepare(checkpoint, options)
    options.gradient_tokens = 0
    assert prepare(checkpoint, options).plan.memory < 1e8
