"""Windows spread over a text, passages that two texts share, and planted second moments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import globe.embedded
from globe.calibration.collect import LayerSums, watched
from globe.calibration.experts_module import ExpertsView
from globe.calibration.text import overlap, passages, read_tokenizer, spread_windows
from globe.errors import ConfigError


def test_windows_are_spread_from_the_first_to_the_last() -> None:
    ids = torch.arange(103)
    windows = spread_windows(ids, window=10, tokens=45)
    assert windows.tolist() == [list(range(start, start + 10)) for start in (0, 30, 60, 90)]
    assert spread_windows(ids, window=10, tokens=1000).shape == (10, 10)
    assert spread_windows(ids, window=10, tokens=9).tolist() == [list(range(10))]
    with pytest.raises(ConfigError, match="103 tokens, fewer than"):
        spread_windows(ids, window=104, tokens=200)


def test_texts_that_share_a_part_share_their_passages() -> None:
    text = globe.embedded.calibration_path().read_text(encoding="utf-8")
    calibration = passages([text[:20_000], text[30_000:]])
    heldout = globe.embedded.text_path().read_text(encoding="utf-8")
    other = passages([heldout])
    assert len(other) > len(heldout) / 40
    assert overlap(other, calibration) == 0
    half = passages([heldout[:10_000] + text[5_000:15_000].replace("\n", "  ").upper()])
    assert 0.4 < overlap(half, calibration) < 0.6
    assert overlap(passages(["short"]), calibration) == 0


class PlantedExperts(nn.Module):
    """Two experts of p = 3 and d = 4 that are called as transformers calls them; what they give does not matter."""

    def __init__(self) -> None:
        super().__init__()
        gate = torch.zeros(2, 3, 4)
        up = torch.zeros(2, 3, 4)
        for k in range(3):
            gate[:, k, k], up[:, k, k + 1] = 1.0, 2.0
        down = torch.zeros(2, 4, 3)
        for k in range(3):
            down[0, k, k], down[1, k, k] = k + 1.0, 2.0
        self.gate_up_proj = nn.Parameter(torch.cat([gate, up], dim=1))
        self.down_proj = nn.Parameter(down)
        self.act_fn = nn.ReLU()
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = True, False, False, True

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x


def test_planted_inputs_have_the_moments_that_were_planted() -> None:
    module = PlantedExperts()
    view = ExpertsView(module, "model.layers.0.mlp.experts")
    sums = LayerSums(0, view)
    # expert 0 gets 3 e_0 + e_1 at gate 0.5 and 2 e_2 at gate 1; expert 1 gets 3 e_0 + e_1 at 0.25 and -e_3 at 0.5
    x = torch.tensor([[3.0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, -1]])
    index = torch.tensor([[0, 1], [0, 2], [1, 2]])  # 2 marks a pair of another device
    weights = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.5, 0.0]])
    with watched(module, sums), torch.no_grad():
        module(x, index, weights=weights)
    found = sums.finish()
    assert found.counts.tolist() == [2, 2]
    assert found.gate2.tolist() == [1.25, 0.0625 + 0.25]
    C = torch.zeros(4, 4)
    C[:2, :2] = 0.25 * torch.tensor([[9.0, 3], [3, 1]])
    C[2, 2] = 4.0
    torch.testing.assert_close(found.C[0], C / 1.25)
    # h of 3 e_0 + e_1: gate (3, 1, 0), up (2, 0, 0): (6, 0, 0); of 2 e_2: gate (0, 0, 2), up (0, 4, 0): 0
    H = torch.zeros(3, 3)
    H[0, 0] = 0.25 * 36
    torch.testing.assert_close(found.H[0], H / 1.25)
    # by up: act(gate)^2 = (9, 1, 0), (0, 0, 4); down norms (1, 4, 9)
    torch.testing.assert_close(found.rows_up[0], torch.tensor([0.25 * 9, 0.25 * 1 * 4, 4.0 * 9]) / 1.25)
    # by gate: (relu'(gate) up)^2 = (4, 0, 0), (0, 0, 0)
    assert found.rows_gate is not None
    torch.testing.assert_close(found.rows_gate[0], torch.tensor([0.25 * 4, 0.0, 0.0]) / 1.25)
    # outputs: 6 e_0 at 0.5; expert 1: 2 * 6 at 0.25
    torch.testing.assert_close(found.reap, torch.tensor([3.0, 3.0]).double())


def test_a_tokenizer_of_foreign_code_is_refused_without_a_question(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    named = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "evil.T"}})
    )
    with pytest.raises(ConfigError, match="can't be loaded"):
        read_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_was_not_fetched_is_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is a pointer of git-lfs .* `git lfs pull`"):
        read_tokenizer(tmp_path)


def test_a_text_that_is_cut_has_no_paragraph_of_the_others(tmp_path: Path) -> None:
    from runpy import run_path

    cut = run_path(str(Path(__file__).parents[2] / "experiments" / "train_moe" / "calibration.py"))["cut"]
    parts = [f"paragraph number {number:02d} " * 10 for number in range(30)]
    other = "something else " + parts[7].replace(" ", "\n")
    text = cut("\n\n".join(parts), pieces=5, characters=900, without=[other])
    assert "number 07" not in text
    assert len(text) > 2000
