"""What all models that are compared with one original on one text share: the tokens, and the original's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from globe.calibration.text import overlap, passages, tokenise
from globe.evaluation.options import EvaluateOptions
from globe.evaluation.subject import Subject, load_tokenizer
from globe.evaluation.text import Window, read_text, sliding_windows
from globe.numerics.device import pick_device

ROOM = 2**31
"""Bytes of an original's logits that are kept for the next model; what does not fit is computed anew for each."""


class Remembered:
    """The logits of one model, computed once for each group of windows as far as `room` bytes hold them."""

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._kept: dict[tuple[Window, ...], Tensor] = {}

    def __call__(self, group: Sequence[Window], compute: Callable[[], Tensor]) -> Tensor:
        """Return the logits of a group of windows, those of before where they were kept."""
        key = tuple(group)
        if key in self._kept:
            return self._kept[key]
        logits = compute()
        if logits.nbytes <= self._room:
            self._room -= logits.nbytes
            self._kept[key] = logits.clone()  # the view alone would hold what it was cut from
        return logits


class Ground:
    """A text as tokens and windows, and the original in memory, loaded when it is first asked for.

    Raises GlobeError with one sentence for a text, a tokenizer or a device that can't be had.
    """

    def __init__(self, options: EvaluateOptions, subject: Subject, original: Subject | None) -> None:
        self.options = options
        self.original = original
        self.device = pick_device(options.device)
        self.text = read_text(options.text)
        self.tokenizer = load_tokenizer(subject, original, options.tokenizer)
        self.tokens = tokenise(self.text.content, self.tokenizer, max_tokens=options.max_tokens)
        self.windows = sliding_windows(self.tokens.ids.shape[0], window=options.window, stride=options.stride)
        self.remembered = Remembered()
        self._dense: Any = None
        self._tasks: dict[str, dict[str, float]] | None = None

    @property
    def dense(self) -> Any:
        """The original in memory, or None where there is none to compare with."""
        if self._dense is None and self.original is not None:
            self._dense = self.original.load(dtype=self.options.dtype.dtype, device=self.device, S_cache=None)
        return self._dense

    def tasks(self, run: Callable[[Any], dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
        """Return the original's scores on the tasks, which are run on it once."""
        if self._tasks is None:
            self._tasks = {} if self.original is None else run(self.dense)
        return self._tasks

    def settings(self, subject: Subject) -> dict[str, Any]:
        """Return what a figure of the model depends on besides its weights, and hashes of these: plain JSON."""
        calibrated = subject.calibration_passages
        shared = None
        if calibrated is not None:
            text = self.tokenizer.decode(self.tokens.ids, skip_special_tokens=True)
            shared = overlap(passages([text]), calibrated)
        counted = [slice(one.stop - one.scored, one.stop) for one in self.windows]
        return asdict(self.options) | {
            "model": subject.name,
            "dtype": str(self.options.dtype),
            "device": str(self.device),
            "text_sha256": self.text.sha256,
            "calibration_overlap": shared,
            "tokens": self.tokens.ids.shape[0],
            "windows": len(self.windows),
            "counted_tokens": sum(one.scored for one in self.windows),
            "counted_bytes": sum(int(self.tokens.bytes[one].sum()) for one in counted),
            "versions": _versions(),
            "source": subject.source_hashes,
            "banks": subject.bank_hashes,
        }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("globe-moe", "torch", "transformers")}


def arithmetic_of(model: Any) -> torch.dtype:
    """Return the dtype of a model's weights."""
    return next(model.parameters()).dtype
