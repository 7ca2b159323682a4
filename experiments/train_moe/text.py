"""Text to tokens: a byte-level BPE tokenizer trained on the spot, and pieces kept back for validation."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PIECE = 4096
"""Characters of a piece; every `VALIDATION`-th piece is kept out of training."""
VALIDATION = 25


def split(paths: list[Path]) -> tuple[str, str]:
    """(training text, validation text) of UTF-8 files; validation is every 25th piece of 4,096 characters."""
    training, validation = [], []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for number, start in enumerate(range(0, len(text), PIECE)):
            kept = validation if number % VALIDATION == VALIDATION - 1 else training
            kept.append(text[start : start + PIECE])
    return "".join(training), "".join(validation)


def train_tokenizer(text: str, *, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocabulary` entries; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=4 * context
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Token numbers of a text, one int64 vector."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
