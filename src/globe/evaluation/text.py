"""The text a model is measured on: read, made into tokens, cut into sliding windows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import globe.embedded
from globe.calibration.text import Text, read_file
from globe.errors import ConfigError


class Window(NamedTuple):
    """Tokens [start, stop) go through the model; the last `scored` of them are predicted and counted."""

    start: int
    stop: int
    scored: int


def read_text(text: str) -> Text:
    """Return the text of a file, or (`embedded`) the held-out one that comes with the package.

    Raises ConfigError naming `text` if the file is missing, is not UTF-8, or is empty.
    """
    return read_file(text, embedded=globe.embedded.text_path(), option="text")


def sliding_windows(tokens: int, *, window: int, stride: int) -> tuple[Window, ...]:
    """Return windows that begin every `stride` tokens and count each token once, with as much context as fits.

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
    """Return neighbouring windows of one length, at most `batch` together, in order."""
    parts = []
    for _, group in itertools.groupby(windows, key=lambda one: one.stop - one.start):
        same = tuple(group)
        parts += [same[first : first + batch] for first in range(0, len(same), batch)]
    return parts
