"""Experts in chunks, so that no kernel needs a temporary of the size of all experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

CHUNK_NUMBERS = 512 * 1024
"""Numbers of one r x d temporary per chunk: 2 MB in float32, which stay in the cache."""
_halvings = 0


@contextmanager
def halved_chunks(times: int) -> Iterator[None]:
    """Make all chunks of this process smaller, halved so many times, for a fit that memory was too small for."""
    global _halvings
    before, _halvings = _halvings, times
    try:
        yield
    finally:
        _halvings = before


def chunk_size(n: int, r: int, d: int, *, least: int = 4, times: int = 1) -> int:
    """Return how many experts a chunk has: `times` CHUNK_NUMBERS, or `least` if more, in nearly equal chunks.

    Batched products want a few; a last chunk of an odd few makes low-precision products four times as slow.
    """
    most = max(1, max(least, times * CHUNK_NUMBERS // (r * d)) >> _halvings)
    return max(1, -(-n // max(1, -(-n // most))))


def product_chunk_size(n: int, r: int, d: int, m: int, *, itemsize: int) -> int:
    """Return the experts of a chunk of the curvature's products, in a dtype of `itemsize` bytes: buffers of about 4 MB.

    Larger than elsewhere, since every chunk adds to all m atoms: on 60 x 88 x 256 in bfloat16 a product over all
    experts takes 0.7 of the time of three chunks. At least m experts, for the same reason.
    """
    return chunk_size(n, r, d, least=max(4, m), times=max(1, 8 // itemsize))


def expert_chunks(n: int, r: int, d: int, *, size: int | None = None) -> Iterator[slice]:
    """Yield slices of `size` experts that cover range(n); of `chunk_size` if None."""
    size = size or chunk_size(n, r, d)
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))
