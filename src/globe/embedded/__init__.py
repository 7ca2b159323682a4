"""The model and the texts that come with the package: a small trained MoE, so nothing has to be downloaded.

`MODEL_CARD.md` beside this file says where they come from.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def path() -> Path:
    """Return the folder of the embedded checkpoint: config, safetensors, tokenizer."""
    return _HERE / "globe-tiny"


def text_path() -> Path:
    """Return the file of the held-out text for perplexity, UTF-8, never seen in training."""
    return _HERE / "heldout.txt"


def calibration_path() -> Path:
    """Return the file of the calibration text, UTF-8, taken from what the model was trained on."""
    return _HERE / "calibration.txt"
