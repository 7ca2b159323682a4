"""How the inputs of the experts are measured on a calibration text: the group `calibrate`."""

from __future__ import annotations

from dataclasses import dataclass

from globe.config.checks import check, positive
from globe.config.choices import ExportDtype


@dataclass
class CalibrateConfig:
    text: str | None = None
    """Text on which the experts are watched: a UTF-8 file, `embedded` for the one in the package, or null for none."""
    tokens: int = 61440
    """Tokens taken of the text at most, in windows that are spread evenly over it."""
    gradient_tokens: int = 8192
    """Tokens on which the model's gradients are taken, which say how much each direction of a layer's output counts;
    0 takes none and counts all directions alike."""
    window: int = 256
    """Tokens that the model sees at once."""
    batch: int = 16
    """Windows that go through a decoder layer together."""
    memory: float | None = None
    """Gigabytes that calibration may take in memory. Second moments that would not fit are kept as low rank plus
    diagonal, of the largest rank that fits; null keeps them whole where a layer's take at most 16 GB."""
    dtype: ExportDtype = ExportDtype.float32
    """Arithmetic of the model; auto is the checkpoint's own. The statistics are taken in float32 and summed in float64
    whatever stands here."""
    tokenizer: str | None = None
    """Folder of a tokenizer; null is the model's own."""
    out: str | None = None
    """Folder of the statistics; null is one named by model, text and sizes in the folder `calibration` of `output`."""

    def __post_init__(self) -> None:
        check(self.tokens >= 1, "calibrate.tokens", self.tokens, "an integer of at least 1")
        given = self.gradient_tokens
        check(given >= 0, "calibrate.gradient_tokens", given, "an integer of at least 0")
        check(self.window >= 2, "calibrate.window", self.window, "a number of tokens of at least 2")
        check(self.batch >= 1, "calibrate.batch", self.batch, "an integer of at least 1")
        memory = self.memory
        check(memory is None or positive(memory), "calibrate.memory", memory, "gigabytes above 0, or null")
        for key in ("text", "tokenizer", "out"):
            value = getattr(self, key)
            check(value is None or bool(value.strip()), f"calibrate.{key}", value, "a path, or null")
