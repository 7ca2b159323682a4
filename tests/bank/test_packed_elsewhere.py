"""The vLLM plugin, which needs no GloBE, reads packed factors as GloBE does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from globe.bank.packing import Packed
from globe.bank.rounding import Grid, LevelGrid, round_nearest
from scripts import load_script

PLUGIN = Path(__file__).parents[2] / "integrations" / "vllm" / "globe_vllm" / "packed.py"


@pytest.mark.parametrize("leveled", [False, True])
@pytest.mark.parametrize("turned", [None, 3])
def test_the_plugin_reads_the_same_numbers(turned: int | None, leveled: bool) -> None:
    plugin = load_script(PLUGIN, "globe_vllm_packed")
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 12, 11, generator=generator)
    bits = [3, 3, 3, 5, 5, 0, 8, 8, 2, 2, 2]
    grid: Grid | LevelGrid = Grid.of(bits, 11, 4)
    if leveled:
        levels = torch.randint(3, (5, 12), generator=generator).to(torch.uint8)
        grid = LevelGrid((tuple(bits), (0,) * 11, (1,) * 11), levels)
    columns = torch.rand(11, generator=generator) + 0.5
    packed = Packed.of(round_nearest(W, grid), columns, turned)
    layout = packed.layout() | {
        "absent": sorted({"words", "scale", "zero", "columns"} - set(packed.tensors()))
    }
    reader = plugin.Packed(layout)
    found = None
    for name, tensor in packed.tensors().items():
        assert found is None
        found = reader.take(name, tensor)
    assert found is not None
    torch.testing.assert_close(found, packed.values(), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="patch again"):
        plugin.Packed(layout).take("word", tensor)
