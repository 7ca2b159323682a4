"""Text as tokens: read, tokenised, cut into windows that are spread over it, and compared with other text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from globe.errors import ConfigError
from globe.files import read_bytes

EMBEDDED = "embedded"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")

PASSAGE = 60
"""Characters, without white space, of a passage that two texts may have in common."""
_ONE_IN = 16
"""A passage counts if its hash is a multiple of this, so that few numbers stand for a long text."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A text as tokens."""

    ids: Int[Tensor, " t"]
    bytes: Int[Tensor, " t"]
    """UTF-8 bytes of the text that each token stands for; 0 for a token the tokenizer put in front"""


class Text(NamedTuple):
    name: str
    """as it was given"""
    content: str
    sha256: str
    """of the file"""


def read_file(text: str, *, embedded: Path, option: str) -> Text:
    """Return the text of a file, or (`embedded`) the one at the path `embedded`.

    Raises ConfigError naming `option` if the file is missing, is not UTF-8, or is empty.
    """
    path = embedded if text == EMBEDDED else Path(text).expanduser()
    try:
        raw = path.read_bytes()
        content = raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{option}={text!r} can't be read ({error.strerror}): give a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}={text!r} is not UTF-8 (byte {error.start}): convert it") from error
    if not content.strip():
        raise ConfigError(f"{option}={text!r} holds no words: give a text file")
    return Text(text, content, hashlib.sha256(raw).hexdigest())


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a folder. Raises ConfigError if it can't be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)  # not given, it would ask
    except Exception as error:  # of many kinds: an unknown class, a missing library, a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if pointer := next((name for name in _TOKENIZERS if _is_pointer(folder / name)), None):
            raise ConfigError(
                f"{folder / pointer} is a pointer of git-lfs and not the file itself: fetch it with `git lfs pull`"
            ) from error
        raise ConfigError(
            f"the tokenizer in {folder} can't be loaded ({reason}): give the folder of another as tokenizer"
        ) from error


def _is_pointer(path: Path) -> bool:
    """Return whether a file is what git-lfs leaves in the place of one that was not fetched."""
    try:
        return read_bytes(path, 4096).startswith(b"version https://git-lfs")
    except (OSError, ValueError):
        return False


def tokenise(text: str, tokenizer: Any, *, max_tokens: int | None = None) -> Tokens:
    """Return the first `max_tokens` tokens of a text (None: all), with the bytes each of them stands for.

    A character that was split into several tokens counts for the first of them, what a tokenizer leaves out
    between two tokens for the second. A tokenizer that keeps no offsets gets equal bytes for all tokens.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, return_offsets_mapping=fast, verbose=False)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if fast:
        widths = _byte_widths(text)
        ends = np.maximum.accumulate(widths[np.array([stop for _, stop in encoded["offset_mapping"]])])
    else:
        ends = np.arange(1, len(ids) + 1) * len(text.encode()) // len(ids)
    counts = torch.from_numpy(np.diff(ends, prepend=0).astype(np.int64))
    return Tokens(ids[:max_tokens], counts[:max_tokens])


def _byte_widths(text: str) -> np.ndarray:
    """Return UTF-8 bytes before each character of the text, and at the end of all of them."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    each = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(each)])


def spread_windows(ids: Int[Tensor, " t"], *, window: int, tokens: int) -> Int[Tensor, "w window"]:
    """Return windows of neighbouring tokens that together have at most `tokens`, spread evenly over the text.

    The text is cut into windows without overlap; of w that are taken, the first is the text's first and the last its
    last. A text with fewer tokens gives all of its windows. Raises ConfigError for a text shorter than a window.
    """
    whole = ids.shape[0] // window
    if not whole:
        raise ConfigError(
            f"the calibration text has {ids.shape[0]} tokens, fewer than calibrate.window={window}: give a longer text"
        )
    taken = min(max(1, tokens // window), whole)
    picked = torch.linspace(0, whole - 1, taken, dtype=torch.float64).round().long()
    return ids[: whole * window].view(whole, window)[picked]


def passages(parts: Iterable[str]) -> frozenset[int]:
    """Return hashes of passages of texts, wherever they begin: what two texts have in common, so do their sets.

    A passage is 60 characters in a row, without white space and in small letters; one in 16 of them counts.
    """
    found = set()
    for part in parts:
        raw = "".join(part.lower().split())
        for start in range(len(raw) - PASSAGE + 1):
            digest = hashlib.blake2b(raw[start : start + PASSAGE].encode(), digest_size=6).digest()
            if (value := int.from_bytes(digest)) % _ONE_IN == 0:
                found.add(value)
    return frozenset(found)


def overlap(evaluated: frozenset[int], calibration: frozenset[int]) -> float:
    """Return the share of the passages of an evaluated text that stand in the calibration text, 0 to 1."""
    return len(evaluated & calibration) / max(1, len(evaluated))
