"""Tiny checkpoints with a tokenizer and a text, for tests of calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from globe.checkpoint import open_checkpoint
from globe.config.calibrate_options import CalibrateConfig
from tiny_models import write_tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.;"


def write_letters(folder: Path) -> None:
    """A tokenizer of single letters, with numbers that every tiny model knows."""
    numbers = {letter: number + 3 for number, letter in enumerate(LETTERS)} | {"?": 0}
    made = Tokenizer(models.WordLevel(numbers, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(folder)


def text_file(folder: Path, length: int = 700) -> Path:
    generator = torch.Generator().manual_seed(2)
    letters = torch.randint(0, len(LETTERS), (length,), generator=generator).tolist()
    path = folder / "text.txt"
    path.write_text("".join(LETTERS[one] for one in letters))
    return path


def make(tmp_path: Path, model_type: str = "qwen3_moe", **overrides: Any) -> tuple[Any, CalibrateConfig]:
    """A checkpoint with a tokenizer, and options for it."""
    folder = write_tiny(model_type, tmp_path / "model", **overrides)
    write_letters(folder)
    text = text_file(tmp_path)
    options = CalibrateConfig(text=str(text), tokens=13 * 11, window=13, batch=4, out=str(tmp_path / "out"))
    return open_checkpoint(str(folder)), options
