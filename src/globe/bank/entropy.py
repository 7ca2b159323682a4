"""Code integers in as many bits as they are surprising: range asymmetric numeral systems (Duda 2013, arXiv 1311.2540).

Each integer has a class, which says how far integers like it spread: class z stands for rounded numbers of variance
2^(z/2 - 6), four fifths of them normal with 0.7 of that variance and one fifth with 2.2 of it, since what is known of
an integer does not say all of how it spreads. From `_NARROW` on an integer is cut: its lowest bits, one more every
four classes, are as good as random and are coded as such, and what is above them has a class below `_NARROW`.
Frequencies are whole numbers out of 2^15, made in decimal arithmetic, which is the same on every machine. Every
matrix is a stream of its own, with several states side by side: state j takes the integers j, j + lanes, .. of the
matrix, and a state that gets too small reads the stream's next 16 bits.
"""

from __future__ import annotations

from decimal import Context, Decimal
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_NARROW, _CUTS = 28, 7
CLASSES = _NARROW + 4 * _CUTS
_ZERO = 127
"""Symbol of the integer 0 in a narrow class; those of cut bits are 0, 1, .."""
_BITS = 15
_TOTAL = 1 << _BITS
_LOW = 1 << 16
"""A state is kept from here to below 2^32; it begins and ends with this number, which shows damage."""
_INTEGERS_OF_A_STATE = 4096
_MOST_STATES = 64
_PARTS = ((Decimal("0.8"), Decimal("0.7")), (Decimal("0.2"), Decimal("2.2")))
"""Shares of the two normal parts of a class, and their variances as parts of its own."""
_POINTS = 8
"""Points in which the density is taken for each integer."""
_OUT_OF_REACH = 1e4
"""Bits that an integer beyond the reach of a class is said to take, so that its row gets a wider one."""


class Tables(NamedTuple):
    """What the classes say of integers. Symbols are what is coded: of narrow classes, then those of cut bits."""

    frequency: NDArray[np.uint32]
    """(narrow classes and numbers of cut bits, 255) of each symbol; 0 beyond the reach of a class"""
    below: NDArray[np.uint32]
    """sums of the frequencies of the symbols before"""
    symbol: NDArray[np.uint8]
    """(as above, 2^15): the symbol that a number belongs to"""
    cut: NDArray[np.int16]
    """(classes,): bits that are cut off"""
    reach: NDArray[np.int16]
    """(classes,): largest integer"""
    length: NDArray[np.float32]
    """(classes, largest integer + 1): bits of an integer by its size"""


@cache
def tables() -> Tables:
    """Return the tables, made at the first call."""
    frequency = np.zeros((_NARROW + _CUTS + 1, 2 * _ZERO + 1), dtype=np.uint32)
    farthest = np.zeros(_NARROW, dtype=np.int64)
    for z in range(_NARROW):
        counts = _counts(z)
        farthest[z] = len(counts) - 1
        frequency[z, _ZERO : _ZERO + len(counts)] = counts
        frequency[z, _ZERO - len(counts) + 1 : _ZERO + 1] = counts[::-1]
    for bits in range(_CUTS + 1):
        frequency[_NARROW + bits, : 1 << bits] = _TOTAL >> bits
    below = (frequency.cumsum(axis=1) - frequency).astype(np.uint32)
    symbol = np.stack([np.repeat(np.arange(2 * _ZERO + 1, dtype=np.uint8), one) for one in frequency])
    cut = np.maximum(0, (np.arange(CLASSES) - _NARROW + 4) // 4)
    narrow = np.arange(CLASSES) - 4 * cut
    reach = (farthest[narrow] << cut) + (1 << cut >> 1) - (cut > 0)
    length = np.full((CLASSES, reach.max() + 1), _OUT_OF_REACH, dtype=np.float32)
    for z, (c, own) in enumerate(zip(cut, narrow, strict=True)):
        above = (np.arange(reach[z] + 1) + (1 << c >> 1)) >> c
        length[z, : reach[z] + 1] = _BITS + c - np.log2(frequency[own, _ZERO + above])
    return Tables(frequency, below, symbol, cut.astype(np.int16), reach.astype(np.int16), length)


def _counts(z: int) -> list[int]:
    """Return the frequencies of 0, 1, .. in a class: at least 1, up to six deviations of its wide part and 3 more."""
    context = Context(prec=28)
    variance = context.divide(context.power(Decimal(2), z // 2), Decimal(64))
    if z % 2:
        variance = context.multiply(variance, context.sqrt(Decimal(2)))
    parts = [(share, context.multiply(variance, part)) for share, part in _PARTS]
    farthest = int(context.multiply(Decimal(6), context.sqrt(parts[-1][1]))) + 3
    weights = []
    for q in range(farthest + 1):
        mass = Decimal(0)
        for point in range(_POINTS):
            x = Decimal(q) + Decimal(2 * point + 1 - _POINTS) / Decimal(2 * _POINTS)
            for share, own in parts:
                power = context.divide(context.multiply(x, x), context.multiply(Decimal(-2), own))
                height = context.divide(share, context.sqrt(own))
                mass = context.add(mass, context.multiply(height, context.exp(power)))
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
    integers: NDArray[np.int16], classes: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the streams of n matrices one after the other, and where each ends, in bytes.

    integers, classes   (n, integers) of each matrix; no integer may lie beyond the reach of its class
    """
    n, count = integers.shape
    table, lanes = tables(), states_of(count)
    integers, classes = _side_by_side(integers, lanes), _side_by_side(classes, lanes)
    state: NDArray[Any] = np.full((n, lanes), _LOW, dtype=np.uint64)
    words, out = [], []
    for at, kind, cut, is_cut in reversed(_symbols_of(classes)):
        shifted = integers[:, at] + (1 << cut >> 1)
        symbol = shifted & ((1 << cut) - 1) if is_cut else (shifted >> cut) + _ZERO
        f = table.frequency[kind, symbol].astype(np.uint64)
        full = state >= f << np.uint64(32 - _BITS)
        out.append(full)
        words.append((state & np.uint64(0xFFFF)).astype("<u2"))
        state = np.where(full, state >> np.uint64(16), state)
        state = ((state // f) << np.uint64(_BITS)) + state % f + table.below[kind, symbol]
    each, kept = (np.stack(one[::-1], axis=1) for one in (words, out))
    streams = [
        np.concatenate([state[i].astype("<u4").view(np.uint8), each[i][kept[i]].view(np.uint8)])
        for i in range(n)
    ]
    ends = np.cumsum([len(one) for one in streams])
    return np.concatenate(streams), ends


def decode(
    stream: NDArray[np.uint8], ends: NDArray[np.int64], classes: NDArray[np.uint8]
) -> NDArray[np.int16]:
    """Return the integers that `encode` was given. Raises ValueError for a stream that none of these classes give."""
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
    classes = _side_by_side(classes, lanes)
    integers = np.zeros(classes.shape, dtype=np.int16)
    for at, kind, cut, is_cut in _symbols_of(classes):
        slot = state & np.uint64(_TOTAL - 1)
        found = table.symbol[kind, slot]
        integers[:, at] += found - (1 << cut >> 1) if is_cut else (found.astype(np.int16) - _ZERO) << cut
        state = table.frequency[kind, found] * (state >> np.uint64(_BITS)) + slot - table.below[kind, found]
        short = state < _LOW
        order = np.cumsum(short, axis=1)
        taken = np.minimum(place[:, None] + order - 1, len(words) - 1)
        state = np.where(short, (state << np.uint64(16)) | words[taken], state)
        place = place + order[:, -1]
    if np.any(place != bounds) or np.any(state != _LOW):
        raise ValueError("a damaged stream")
    return integers.reshape(n, -1)[:, :count]


def _symbols_of(
    classes: NDArray[np.uint8],
) -> list[tuple[int, NDArray[np.int16], NDArray[np.int16], bool]]:
    """Return place, kinds of symbols, cut bits and whether these are what is coded, in the order of reading.

    A place at which no matrix has cut bits has no symbols of such; where only others have, they change no state.
    """
    found = []
    for at in range(classes.shape[1]):
        cut = tables().cut[classes[:, at]]
        found.append((at, classes[:, at] - 4 * cut, cut, False))
        if cut.any():
            found.append((at, _NARROW + cut, cut, True))
    return found


def _side_by_side(each: NDArray[Any], lanes: int) -> NDArray[Any]:
    """Return (n, integers) as (n, steps, lanes), filled up with zeros at the end."""
    n, count = each.shape
    steps = -(-count // lanes)
    whole = np.zeros((n, steps * lanes), dtype=each.dtype)
    whole[:, :count] = each
    return whole.reshape(n, steps, lanes)
