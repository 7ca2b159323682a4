"""Experts in chunks, so that no kernel needs a temporary of the size of all experts."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_NUMBERS = 512 * 1024
"""Numbers of one r x d temporary per chunk: 2 MB in float32. On 60 x 88 x 256 the products of a
conjugate-gradient iteration ran 1.3 times as fast in chunks of 20 experts as all at once, on one thread."""


def chunk_size(n: int, r: int, d: int, *, least: int = 4) -> int:
    """Experts of a chunk: about CHUNK_NUMBERS, or `least` where that is more, in chunks of nearly equal length.

    Batched products want a few; a last chunk of an odd few makes low-precision products four times as slow.
    """
    most = max(least, CHUNK_NUMBERS // (r * d))
    return max(1, -(-n // max(1, -(-n // most))))


def expert_chunks(n: int, r: int, d: int, *, least: int = 4) -> Iterator[slice]:
    """Slices of `chunk_size` experts that cover range(n)."""
    size = chunk_size(n, r, d, least=least)
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))
