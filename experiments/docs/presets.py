"""Write the table of presets in docs/architectures.md: what each model of conf/model takes, as the dry run counts it.

    python experiments/docs/presets.py

Shapes are those of the models' public configurations. Time is that of the reference core (`globe.sizes.costs`) for 60
steps of every bank, and memory is counted, so that the table is the same on every machine; `dry_run=true` measures.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from globe.checkpoint import Checkpoint, ExpertShape
from globe.config.keywords import configure
from globe.fit.plan import outline
from globe.sizes.costs import average_work, reference_seconds
from globe.sizes.dry_run import bytes_of, candidate_plans

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
KEPT = 0.5


class Preset(NamedTuple):
    path: str
    layers: int
    """with routed experts"""
    n: int
    p: int
    d: int


PRESETS = {
    "deepseek_v2_lite": Preset("deepseek-ai/DeepSeek-V2-Lite", 26, 64, 1408, 2048),
    "deepseek_v3": Preset("deepseek-ai/DeepSeek-V3", 58, 256, 2048, 7168),
    "glm_45_air": Preset("zai-org/GLM-4.5-Air", 45, 128, 1408, 4096),
    "gpt_oss_20b": Preset("openai/gpt-oss-20b", 24, 32, 2880, 2880),
    "granite_3b_a800m": Preset("ibm-granite/granite-3.1-3b-a800m-base", 32, 40, 512, 1536),
    "mixtral_8x7b": Preset("mistralai/Mixtral-8x7B-v0.1", 32, 8, 14336, 4096),
    "moonlight_16b_a3b": Preset("moonshotai/Moonlight-16B-A3B", 26, 64, 1408, 2048),
    "olmoe": Preset("allenai/OLMoE-1B-7B-0924", 16, 64, 1024, 2048),
    "qwen15_moe": Preset("Qwen/Qwen1.5-MoE-A2.7B", 24, 60, 1408, 2048),
    "qwen3_30b_a3b": Preset("Qwen/Qwen3-30B-A3B", 48, 128, 768, 2048),
}


class Shapes(Checkpoint):
    """A checkpoint of which only the shapes are known."""

    def __init__(self, preset: Preset) -> None:
        self.preset, self.num_layers = preset, preset.layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(range(self.preset.layers))

    def shape(self, layer: int, family: str) -> ExpertShape:
        return ExpertShape(self.preset.n, self.preset.p, self.preset.d)

    def dtype(self, layer: int, family: str) -> torch.dtype:
        return torch.bfloat16


def row(name: str, preset: Preset) -> str:
    """One line of the table: the dense candidate with a bank of a few atoms stands for what a search chooses."""
    config = configure({"bank.kept": KEPT, "layer": "all", "family": "both"})
    model = Shapes(preset)
    banks = outline(config, model)
    plans = [one for one in candidate_plans(config, banks[0]) if one.sizes.atom_rank is None]
    plan = min(plans, key=lambda one: abs(one.sizes.m - max(2, preset.n // 8)))
    hours = len(banks) * config.train.steps * reference_seconds(average_work(config, plan.sizes)) / 3600
    memory = bytes_of(config, model, plan) / 2**30
    sizes = f"m={plan.sizes.m} r={plan.sizes.r}"
    shape = f"{preset.n} x {preset.p} x {preset.d}"
    return f"| `{name}` | {preset.path} | {shape} | {len(banks)} | {sizes} | {hours:,.0f} | {memory:.1f} |"


def render() -> str:
    """The table in Markdown."""
    head = [
        f"| `model=` | path | n x p x d | banks | sizes at `bank.kept={KEPT}`, such as | core hours | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row(name, preset) for name, preset in sorted(PRESETS.items()))])


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- presets -->\n", "<!-- end of presets -->"
    text = re.sub(f"{start}.*?{end}", lambda match: f"{start}{render()}\n{end}", text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
