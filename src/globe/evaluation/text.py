"""The text a model is measured on: read, made into tokens, cut into sliding windows."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

import globe.embedded
from globe.errors import ConfigError

EMBEDDED = "embedded"


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


class Window(NamedTuple):
    """Tokens [start, stop) go through the model; the last `scored` of them are predicted and counted."""

    start: int
    stop: int
    scored: int


def read_text(text: str) -> Text:
    """The text of a file, or (`embedded`) the one that comes with the package.

    Raises ConfigError naming `text` if the file is missing, is not UTF-8, or is empty.
    """
    path = globe.embedded.text_path() if text == EMBEDDED else Path(text).expanduser()
    try:
        raw = path.read_bytes()
        content = raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"text={text!r} can't be read ({error.strerror}): give a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"text={text!r} is not UTF-8 (byte {error.start}): convert it") from error
    if not content.strip():
        raise ConfigError(f"text={text!r} holds no words: give a text file")
    return Text(text, content, hashlib.sha256(raw).hexdigest())


def tokenise(text: str, tokenizer: Any, *, max_tokens: int | None = None) -> Tokens:
    """The first `max_tokens` tokens of a text (None: all), with the bytes each of them stands for.

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
    """UTF-8 bytes before each character of the text, and at the end of all of them."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    each = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(each)])


def sliding_windows(tokens: int, *, window: int, stride: int) -> tuple[Window, ...]:
    """Windows that begin every `stride` tokens and count each token once, with as much context as fits.

    A token is predicted from at least `window - stride` tokens before it, apart from those of the first
    window. With `stride = window` the windows do not overlap and the first token of each, which has no
    context, is not counted; nor is the first token of the text ever. Raises ConfigError for a text shorter
    than a window, and for a stride that would leave tokens out.
    """
    if window < 2:
        raise ConfigError(f"window={window} is not possible: give a number of tokens of at least 2")
    if not 1 <= stride <= window:
        raise ConfigError(
            f"stride={stride} is not possible: give a number of tokens from 1 to window={window}"
        )
    if tokens < window:
        raise ConfigError(
            f"the text has {tokens} tokens, fewer than window={window}: give a longer text or a smaller window"
        )
    found, counted = [], 0
    for start in range(0, tokens, stride):
        stop = min(start + window, tokens)
        scored = min(stop - counted, stop - start - 1)
        if scored:
            found.append(Window(start, stop, scored))
        counted = stop
        if stop == tokens:
            break
    return tuple(found)


def batches(windows: Sequence[Window], batch: int) -> list[tuple[Window, ...]]:
    """Neighbouring windows of one length, at most `batch` together, in order."""
    parts = []
    for _, group in itertools.groupby(windows, key=lambda one: one.stop - one.start):
        same = tuple(group)
        parts += [same[first : first + batch] for first in range(0, len(same), batch)]
    return parts
