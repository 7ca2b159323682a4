"""python -m globe.calibrate model=MODEL [text=TEXT] [KEY=VALUE ...]

Run a model over a text and write what each of its experts gets and makes there: second moments of inputs, weights of
rows, scores. One decoder layer at a time is in memory; the same command goes on where a killed one stopped.

model=embedded     checkpoint folder or hub id, or the model that comes with the package
text=embedded      UTF-8 text file, or the calibration text that comes with the package
out=null           folder to write; null is outputs/calibration/NAME, named by model, text and sizes
layer=all          layers: 12, [4,12,20], 4-8 or all; the layers before are computed as well
tokens=61440       tokens of the text at most, in windows that are spread evenly over it
gradient_tokens=8192  tokens on which gradients say how much each direction of an output counts; 0: all alike
window=256         tokens the model sees at once
batch=16           windows that go through a layer together
memory=null        gigabytes to use at most; what would not fit is kept as low rank plus diagonal
dtype=float32      arithmetic of the model: float32, bfloat16, float16, float64, or auto (as stored)
device=auto        auto, cpu, cuda or mps
tokenizer=null     folder of a tokenizer; null is the model's
revision=null      revision of a hub id
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from globe.calibration.run import Calibration, calibrate
from globe.calibration.statistics import LayerStatistics
from globe.calibration.text import EMBEDDED
from globe.checkpoint import open_checkpoint
from globe.config.calibrate_options import CalibrateConfig
from globe.config.choices import Device, ExportDtype
from globe.config.command_line import path_option, run_command
from globe.config.commands import start
from globe.config.console import add_row, new_table, say, show_table, wide_console
from globe.config.layers import parse_layers
from globe.numerics.device import pick_device, return_large_blocks


@dataclass
class CalibrateOptions:
    """The options of the command, as the text above says."""

    model: str = path_option(EMBEDDED)
    text: str = path_option(EMBEDDED)
    out: str | None = path_option(None)
    layer: Any = "all"
    tokens: int = 61440
    gradient_tokens: int = 8192
    window: int = 256
    batch: int = 16
    memory: float | None = None
    dtype: ExportDtype = ExportDtype.float32
    device: Device = Device.auto
    tokenizer: str | None = path_option(None)
    revision: str | None = None

    def __post_init__(self) -> None:
        self.config()  # which checks the values

    def config(self) -> CalibrateConfig:
        """Return the same options as the group `calibrate` of a run."""
        return CalibrateConfig(
            text=self.text,
            tokens=self.tokens,
            gradient_tokens=self.gradient_tokens,
            window=self.window,
            batch=self.batch,
            memory=self.memory,
            dtype=self.dtype,
            tokenizer=self.tokenizer,
            out=self.out,
        )


def main() -> None:
    return_large_blocks()
    run_command(
        __doc__ or "", CalibrateOptions, _calibrate_and_show, positional="model", resumes=lambda options: True
    )


def _calibrate_and_show(options: CalibrateOptions) -> None:
    checkpoint = open_checkpoint(
        None if options.model == EMBEDDED else options.model, revision=options.revision
    )
    layers = parse_layers(options.layer, checkpoint.moe_layers, checkpoint.num_layers)
    console = wide_console()
    found = calibrate(
        checkpoint,
        options.config(),
        layers=layers,
        device=pick_device(options.device),
        say=lambda line: say(console, line),
    )
    show(found, layers)


def show(calibration: Calibration, layers: Sequence[int]) -> None:
    """Print how the text was spread over the experts, and how many directions its inputs have."""
    record = calibration.record
    headings = (
        "layer",
        "experts",
        "without tokens",
        "fewest",
        "median",
        "most tokens",
        "directions of inputs",
    )
    table = new_table(f"{record['tokens']:,} tokens of {record['text']}", headings)
    for layer in layers:
        one = calibration.layer(layer)
        counts = one.counts.sort().values
        middle = float(counts[len(counts) // 2])
        cells = [len(counts), int((counts == 0).sum()), int(counts[0]), int(middle), int(counts[-1])]
        add_row(
            table, [str(layer), *(f"{cell:,}" for cell in cells), f"{directions(one):.1f} of {one.inputs.q}"]
        )
    console = wide_console()
    show_table(console, table)
    say(console, f"{calibration.folder}: statistics of {len(layers)} layer{'s' * (len(layers) != 1)}")


def directions(statistics: LayerStatistics) -> float:
    """Return tr(C)^2 / ||C||^2 of a layer's inputs: so many directions of equal energy are as concentrated."""
    mean = torch.zeros(statistics.inputs.q, statistics.inputs.q)
    for expert, weight in enumerate(statistics.gate2.tolist()):
        mean.add_(statistics.inputs.dense([expert])[0], alpha=weight)
    return float(mean.trace().square() / mean.square().sum().clamp_min(1e-30))


if __name__ == "__main__":
    start(main)
