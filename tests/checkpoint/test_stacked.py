"""Experts whose matrices stand one below the other in one tensor, as DBRX has them: a JSON file describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from globe.checkpoint import copy_checkpoint, open_checkpoint
from globe.checkpoint.architecture import parse_architecture
from globe.errors import CheckpointError

N, P, D, LAYERS = 5, 7, 11, 2
PREFIX = "transformer.blocks.{}.ffn.experts.mlp.{}"
STORED = {"gate": "w1", "up": "v1", "down": "w2"}


def dbrx(folder: Path, **changes: Any) -> Path:
    """A checkpoint of random experts, with the names, shapes and config.json of DBRX."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        PREFIX.format(layer, name): torch.randn(N * P, D, generator=generator)
        for layer in range(LAYERS)
        for name in STORED.values()
    }
    folder.mkdir()
    save_file(tensors | {"transformer.wte.weight": torch.randn(13, D)}, folder / "model.safetensors")
    experts = {"moe_num_experts": N, "ffn_hidden_size": P} | changes
    config = {"model_type": "dbrx", "d_model": D, "n_layers": LAYERS, "ffn_config": experts}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", STORED)
def test_each_expert_is_its_own_rows(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(str(dbrx(tmp_path / "model")))
    assert checkpoint.moe_layers == (0, 1)
    whole = load_file(tmp_path / "model" / "model.safetensors")[PREFIX.format(1, STORED[family])]
    experts = checkpoint.read_experts(1, family)
    assert experts.weights.shape == (N, P, D)
    for expert in range(N):
        for row in range(P):
            assert torch.equal(experts.weights[expert, row], whole[expert * P + row])
    few = open_checkpoint(str(tmp_path / "model"))
    assert torch.equal(few.read_experts(1, family, max_experts=2).weights, experts.weights[:2])
    assert few.reader.bytes_read == 2 * P * D * 4


def test_one_expert_is_replaced_and_the_others_are_not(tmp_path: Path) -> None:
    source = dbrx(tmp_path / "model")
    checkpoint = open_checkpoint(str(source))
    place = checkpoint.locate(0, "down", 3)

    def fill(stored: torch.Tensor) -> torch.Tensor:
        place.view(stored).fill_(2.5)
        return stored

    copy_checkpoint(source, tmp_path / "out", {place.tensor: fill})
    before = checkpoint.read_experts(0, "down").weights
    after = open_checkpoint(str(tmp_path / "out")).read_experts(0, "down").weights
    assert bool((after[3] == 2.5).all())
    kept = [0, 1, 2, 4]
    assert torch.equal(after[kept], before[kept])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"moe_num_experts": 4}, "has 35 rows, which the 4 experts of config.json cannot share"),
        ({"moe_num_experts": 0}, "does not say how many experts share the rows"),
        ({"moe_num_experts": None}, "does not say how many experts share the rows"),
        ({"ffn_hidden_size": 8}, "holds 7 x 11 matrices where config.json promises 8 x 11"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    folder = dbrx(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(str(folder)).read_experts(0, "up")


@pytest.mark.parametrize(
    "changes", [{"transposed": True}, {"up": "{layer}.{expert}.u"}, {"gate_up": "{layer}.gu", "up": ...}]
)
def test_a_file_that_says_stacked_and_something_else_is_refused(changes: dict[str, Any]) -> None:
    layout = {"up": "{layer}.u", "down": "{layer}.d", "stacked": True} | changes
    layout = {key: value for key, value in layout.items() if value is not ...}
    config = dict.fromkeys(("layers", "experts", "rows", "columns"))
    record = {"model_type": "toy", "layouts": [layout], "shared": None, "config": config}
    with pytest.raises(CheckpointError, match="stacked says that a tensor holds one family of all experts"):
        parse_architecture(json.dumps(record), "toy.json", "toy")
