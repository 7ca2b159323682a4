"""Experts in chunks, so that no kernel needs a temporary of the size of all experts."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_NUMBERS = 512 * 1024
"""Numbers of one r x d temporary per chunk: 2 MB in float32. On 60 x 88 x 256 the products of a
conjugate-gradient iteration ran 1.3 times as fast in chunks of 20 experts as all at once, on one thread."""


def expert_chunks(n: int, r: int, d: int, *, least: int = 4) -> Iterator[slice]:
    """Slices of nearly equal length that cover range(n), of about `least` experts at least.

    Batched products want a few; a last slice of an odd few makes low-precision products four times as slow.
    """
    size = max(least, CHUNK_NUMBERS // (r * d))
    size = -(-n // -(-n // size))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))
