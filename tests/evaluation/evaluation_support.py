"""A text, and a tokenizer that has a token for every byte, so that tiny models can read it."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 257
TEXT = (
    "It is a truth — universally acknowledged — that a café in 東京 must be in want of tea. 😀 "
    "However little known the feelings or views of such a house may be, "
) * 3


def write_tokenizer(folder: Path, *, swapped: bool = False) -> None:
    """A token for each of the 256 bytes and one for the end; `swapped` numbers two of them otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if swapped:
        letters[0], letters[1] = letters[1], letters[0]
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(folder)
