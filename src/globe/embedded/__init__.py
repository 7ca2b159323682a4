"""The model and the text that come with the package: a small trained MoE, so nothing has to be downloaded.

`MODEL_CARD.md` beside this file says where both come from.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def path() -> Path:
    """Folder of the embedded checkpoint: config, safetensors, tokenizer."""
    return _HERE / "globe-tiny"


def text_path() -> Path:
    """Held-out text for perplexity, UTF-8: never seen in training."""
    return _HERE / "heldout.txt"
