"""The options of `python -m globe.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import torch

from globe.config.choices import Device
from globe.config.command_line import path_option
from globe.errors import ConfigError
from globe.evaluation.subject import EMBEDDED


class Arithmetic(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype; None keeps that of the files."""
        return None if self is Arithmetic.auto else getattr(torch, self)


@dataclass
class EvaluateOptions:
    """Each is explained by `python -m globe.evaluate --help`."""

    model: str | None = path_option(None)
    sweep: str | None = path_option(None)
    against: str = path_option("auto")
    text: str = path_option(EMBEDDED)
    window: int = 256
    stride: int = 128
    max_tokens: int | None = None
    batch: int = 8
    dtype: Arithmetic = Arithmetic.float32
    device: Device = Device.auto
    tokenizer: str | None = path_option(None)
    S_cache: int | str | None = None
    activation_windows: int = 16
    experts: int = 8
    top_k: int = 8
    seed: int = 0
    tasks: list[str] = field(default_factory=list)
    include_path: str | None = path_option(None)
    limit: int | None = None
    out: str | None = path_option(None)

    def __post_init__(self) -> None:
        least = {
            "max_tokens": 2,
            "batch": 1,
            "activation_windows": 0,
            "experts": 0,
            "top_k": 1,
            "limit": 1,
            "seed": 0,
        }
        for key, smallest in least.items():
            value = getattr(self, key)
            if isinstance(value, int) and not smallest <= value < 2**63:
                raise ConfigError(f"{key}={value} is not possible: give an integer of at least {smallest}")

    def one_model(self) -> str:
        """Return `model`. Raises ConfigError unless that alone, and not a sweep, is given."""
        if self.model is None:
            raise ConfigError("model is missing: give model=MODEL, or sweep=FOLDER for all runs in it")
        if self.sweep is not None:
            raise ConfigError("model and sweep are both given: give one of them")
        return self.model


def output_file(options: EvaluateOptions) -> Path | None:
    """Return where the figures go; None for a model without a folder of one's own, unless `out` is given."""
    if options.out is not None:
        return Path(options.out)
    folder = Path(options.one_model())
    return folder / "evaluation.json" if options.model != EMBEDDED and folder.is_dir() else None
