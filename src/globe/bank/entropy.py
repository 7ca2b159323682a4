"""Code integers in as many bits as they are surprising: range asymmetric numeral systems (Duda 2013, arXiv 1311.2540).

Each integer has a class, which says how far integers like it spread: class z stands for normal numbers of variance
2^(z/2 - 6), rounded. Its frequencies are whole numbers out of 2^15, made in decimal arithmetic, which is the same on
every machine. Every matrix is a stream of its own, with several states side by side: state j takes the integers
j, j + lanes, .. of the matrix, and a state that gets too small reads the stream's next 16 bits.
"""

from __future__ import annotations

from decimal import Context, Decimal
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CLASSES = 36
ZERO = 127
"""Code of the integer 0; codes are 0 .. 254, for -127 .. 127."""
_BITS = 15
_TOTAL = 1 << _BITS
_LOW = 1 << 16
"""A state is kept from here to below 2^32; it begins and ends with this number, which shows damage."""
_INTEGERS_OF_A_STATE = 4096
_MOST_STATES = 64
_POINTS = 8
"""Points in which the density is taken for each integer."""


class Tables(NamedTuple):
    """What the classes say of codes."""

    frequency: NDArray[np.uint32]
    """(classes, 255); 0 beyond the reach of a class"""
    below: NDArray[np.uint32]
    """sums of the frequencies of the codes before"""
    code: NDArray[np.uint8]
    """(classes, 2^15): the code that a number belongs to"""
    reach: NDArray[np.int64]
    """largest integer of a class"""
    length: NDArray[np.float32]
    """(classes, 128): bits of an integer by its size; beyond the reach, those of the largest"""


@cache
def tables() -> Tables:
    """Return the tables, made at the first call."""
    frequency = np.zeros((CLASSES, 2 * ZERO + 1), dtype=np.uint32)
    reach = np.zeros(CLASSES, dtype=np.int64)
    length = np.zeros((CLASSES, ZERO + 1), dtype=np.float32)
    for z in range(CLASSES):
        counts = _counts(z)
        reach[z] = len(counts) - 1
        frequency[z, ZERO : ZERO + len(counts)] = counts
        frequency[z, ZERO - len(counts) + 1 : ZERO + 1] = counts[::-1]
        length[z] = _BITS - np.log2([*counts, *[counts[-1]] * (ZERO + 1 - len(counts))])
    below = (frequency.cumsum(axis=1) - frequency).astype(np.uint32)
    code = np.stack([np.repeat(np.arange(2 * ZERO + 1, dtype=np.uint8), one) for one in frequency])
    return Tables(frequency, below, code, reach, length)


def _counts(z: int) -> list[int]:
    """Return the frequencies of 0, 1, .. in a class: at least 1 up to six deviations and three more."""
    context = Context(prec=28)
    variance = context.divide(context.power(Decimal(2), z // 2), Decimal(64))
    if z % 2:
        variance = context.multiply(variance, context.sqrt(Decimal(2)))
    farthest = min(ZERO, int(context.multiply(Decimal(6), context.sqrt(variance))) + 3)
    weights = []
    for q in range(farthest + 1):
        mass = Decimal(0)
        for point in range(_POINTS):
            x = Decimal(q) + Decimal(2 * point + 1 - _POINTS) / Decimal(2 * _POINTS)
            power = context.divide(context.multiply(x, x), context.multiply(Decimal(-2), variance))
            mass = context.add(mass, context.exp(power))
        weights.append(mass)
    whole = context.subtract(context.multiply(Decimal(2), sum(weights, Decimal(0))), weights[0])
    room = _TOTAL - (2 * farthest + 1)
    counts = [1 + int(context.divide(context.multiply(one, Decimal(room)), whole)) for one in weights]
    counts[0] += _TOTAL - 2 * sum(counts) + counts[0]
    return counts


def states_of(integers: int) -> int:
    """Return the states that code so many integers of a matrix: each takes 4 bytes, and they run side by side."""
    return max(1, min(_MOST_STATES, integers // _INTEGERS_OF_A_STATE))


def encode(
    codes: NDArray[np.uint8], classes: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the streams of n matrices one after the other, and where each ends, in bytes.

    codes, classes   (n, integers) of each matrix; no code may lie beyond the reach of its class
    """
    n, count = codes.shape
    table, lanes = tables(), states_of(count)
    codes, classes = _side_by_side(codes, lanes, ZERO), _side_by_side(classes, lanes, 0)
    steps = codes.shape[1]
    state: NDArray[Any] = np.full((n, lanes), _LOW, dtype=np.uint64)
    words = np.empty((n, steps, lanes), dtype=np.uint16)
    out = np.empty((n, steps, lanes), dtype=bool)
    for at in range(steps - 1, -1, -1):
        f = table.frequency[classes[:, at], codes[:, at]].astype(np.uint64)
        c = table.below[classes[:, at], codes[:, at]]
        out[:, at] = state >= f << np.uint64(32 - _BITS)
        words[:, at] = state & np.uint64(0xFFFF)
        state = np.where(out[:, at], state >> np.uint64(16), state)
        state = ((state // f) << np.uint64(_BITS)) + state % f + c
    streams = [
        np.concatenate([state[i].astype("<u4").view(np.uint8), words[i][out[i]].astype("<u2").view(np.uint8)])
        for i in range(n)
    ]
    ends = np.cumsum([len(one) for one in streams])
    return np.concatenate(streams), ends


def decode(
    stream: NDArray[np.uint8], ends: NDArray[np.int64], classes: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Return the codes that `encode` was given. Raises ValueError for a stream that no codes of these classes give."""
    n, count = classes.shape
    table, lanes = tables(), states_of(count)
    starts = np.concatenate([[0], ends[:-1]])
    sizes = ends - starts - 4 * lanes
    if np.any(sizes < 0) or np.any(sizes % 2) or (n and ends[-1] != len(stream)):
        raise ValueError("streams of a length that none can have")
    state = np.stack([stream[at : at + 4 * lanes].view("<u4") for at in starts]).astype(np.uint64)
    words = np.concatenate(
        [
            *(stream[at + 4 * lanes : end].view("<u2") for at, end in zip(starts, ends, strict=True)),
            np.zeros(1, np.uint16),
        ]
    ).astype(np.uint64)
    bounds = np.cumsum(sizes // 2)
    place = bounds - sizes // 2
    classes = _side_by_side(classes, lanes, 0)
    codes = np.empty(classes.shape, dtype=np.uint8)
    for at in range(classes.shape[1]):
        slot, own = state & np.uint64(_TOTAL - 1), classes[:, at]
        found = codes[:, at] = table.code[own, slot]
        state = table.frequency[own, found] * (state >> np.uint64(_BITS)) + slot - table.below[own, found]
        short = state < _LOW
        order = np.cumsum(short, axis=1)
        taken = np.minimum(place[:, None] + order - 1, len(words) - 1)
        state = np.where(short, (state << np.uint64(16)) | words[taken], state)
        place = place + order[:, -1]
    if np.any(place != bounds) or np.any(state != _LOW):
        raise ValueError("a damaged stream")
    return codes.reshape(n, -1)[:, :count]


def _side_by_side(each: NDArray[np.uint8], lanes: int, fill: int) -> NDArray[np.uint8]:
    """Return (n, integers) as (n, steps, lanes), filled up at the end."""
    n, count = each.shape
    steps = -(-count // lanes)
    whole = np.full((n, steps * lanes), fill, dtype=np.uint8)
    whole[:, :count] = each
    return whole.reshape(n, steps, lanes)
