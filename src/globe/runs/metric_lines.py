"""The lines of metrics.jsonl as they can be had from a file of unknown origin: one by one, and bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from globe.files import open_regular

_LONGEST_LINE, _MOST_LINES = 1 << 16, 10_000_000
"""Bytes of a line, and lines, that are read."""


def metric_lines(file: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the object in each line, or None for a line that holds none, such as one that a kill has cut.

    Raises
    ------
    OSError, or ValueError if it is no regular file.
    """
    with BufferedReader(open_regular(file)) as lines:
        for _ in range(_MOST_LINES):
            if not (line := lines.readline(_LONGEST_LINE)):
                return
            yield _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "bank" in record else None
