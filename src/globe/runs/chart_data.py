"""Data of a bank that can only be drawn: a part of `summary.json` that stays small whatever the bank's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_CODES = 2048
"""Code shares that are kept of a bank."""
MOST_ATOMS = 64
MOST_RANKS = 64
"""Singular values that are kept of a spectrum."""


@dataclass(frozen=True, slots=True)
class BankCharts:
    """Code shares and spectra, rounded to what an eye can see."""

    code_experts: tuple[int, ...]
    """rows of the bank whose codes are kept: all, or evenly spaced ones"""
    code_atoms: tuple[int, ...]
    """atoms whose codes are kept, ascending: all, or those with the largest shares over all experts"""
    code_shares: tuple[tuple[float, ...], ...]
    """alpha_ij / sum_j alpha_ij of these experts (rows) and atoms (columns); the sum runs over all atoms"""
    spectrum_experts: tuple[int, ...]
    """rows of the bank whose singular values are averaged"""
    spectrum_ranks: tuple[int, ...]
    """which singular values are kept, from 1"""
    spectrum_original: tuple[float, ...]
    """those of the normalised experts, mean over `spectrum_experts`"""
    spectrum_rebuilt: tuple[float, ...]
    """the same of the rebuilt experts; what is below 1e-8 of an expert's largest is rounding"""


def spread_out(n: int, count: int) -> list[int]:
    """Return `count` of n positions (all if there are no more), evenly spaced from the first to the last."""
    count = min(n, count)
    return [position * (n - 1) // max(count - 1, 1) for position in range(count)]


def largest(values: Sequence[float], count: int) -> list[int]:
    """Return the positions of the `count` largest values in ascending order; of equal values the first count."""
    order = sorted(range(len(values)), key=lambda at: (-values[at], at))
    return sorted(order[:count])
