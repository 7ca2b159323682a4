"""The shares that `budget.over=model` chose for the banks of a run: the record, and its file `allocation.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from globe.files import parse_record, plain_record, read_record, write_json

FILE = "allocation.json"
FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True)
class Share:
    """What one bank gets."""

    key: str
    parameters: int
    """numbers of its experts"""
    kept: float
    """share of them that it may keep; 1.0 leaves them as they are"""
    sensitivity: float
    """divergence (nats per token) of the model with this bank alone, as a shared basis at the run's share; 1 where none
    was measured"""
    loss: float
    """predicted, at `kept`: in nats per token, or as a share of the bank's energy"""
    uniform_loss: float
    """the same at the run's share"""


@dataclass(frozen=True, slots=True)
class Allocation:
    """The shares of all banks of a run."""

    kept: float
    """of all numbers together"""
    measured: bool
    """whether the losses are divergences on a calibration text"""
    shares: tuple[Share, ...]

    @property
    def used(self) -> float:
        """Share of all numbers that the banks may keep together."""
        return sum(int(one.kept * one.parameters) for one in self.shares) / sum(
            one.parameters for one in self.shares
        )


def write_allocation(found: Allocation, file: Path, *, fingerprint: str) -> None:
    """Write the file whole or not at all; `fingerprint` says what it is of."""
    write_json(file, {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, **plain_record(found)})


def read_allocation(file: Path, *, fingerprint: str | None = None) -> Allocation | None:
    """Return what a file holds; None for a damaged one, one of another `fingerprint` where one is given, or none."""
    record = read_record(file)
    if record is None or record.pop("format_version", None) != FORMAT_VERSION:
        return None
    if record.pop("fingerprint", None) != fingerprint and fingerprint is not None:
        return None
    try:
        found = parse_record(Allocation, record)
    except ValueError:
        return None
    possible = all(one.key.isprintable() and 0 < one.kept <= 1 and one.parameters > 0 for one in found.shares)
    return found if found.shares and possible and 0 < found.kept <= 1 else None
