"""Experts shared out over processes: what has to be added up, and what has to be the same everywhere.

Every rank holds a slice of the experts with their adapters, codes and bases, and a copy of the bank. Sums over experts
become sums over processes; what is computed on every process from such sums is taken from process 0 where a
rounding that differs
between machines could lead processes to different decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from globe.errors import FitError

_T = TypeVar("_T")


class ProcessGroup:
    """One process that holds all experts: nothing to add, nothing to send. `Sharded` is the same over several.

    With several, all of them must make the same calls in the same order.
    """

    rank: int = 0
    rows: slice = slice(None)
    """which of a bank's experts are here"""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over processes, on all of them; the given tensor may be overwritten by it."""
        return tensor

    def total(self, value: float) -> float:
        """Return the sum of one number over processes."""
        return value

    def average(self, mean: Tensor) -> Tensor:
        """Return the mean over all experts, from the means over the experts of each process."""
        return mean

    def any(self, own: bool) -> bool:
        """Say whether it holds on some process."""
        return own

    def count(self, own: int) -> int:
        """Return the number of experts of all processes."""
        return own

    def same(self, tensor: Tensor) -> Tensor:
        """Return process 0's tensor, on all processes; the given one may be overwritten by it."""
        return tensor

    def agreed(self, value: float) -> float:
        """Return process 0's number."""
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """Return every expert's row, from the rows of each process; for what is small."""
        return rows

    def collect(self, rows: Tensor) -> Tensor:
        """Do the same on process 0 alone; other processes get their own rows back."""
        return rows

    def own(self, rows: Tensor) -> Tensor:
        """Return this process's part of every expert's rows."""
        return rows

    def within(self, start: int, stop: int) -> ProcessGroup:
        """Return the same processes for the experts `start` to `stop` of these, one member of a bank."""
        return self


ALONE = ProcessGroup()


class ShardedGroup(ProcessGroup):
    """The processes of `torch.distributed`'s default group, with experts `bounds[rank]` to `bounds[rank + 1]` on
    each."""

    def __init__(self, rank: int, bounds: tuple[int, ...], device: torch.device) -> None:
        self.rank, self.bounds, self.device = rank, bounds, device
        self.rows = slice(bounds[rank], bounds[rank + 1])

    @classmethod
    def of(cls, n: int, device: torch.device) -> ShardedGroup:
        """n experts in slices that differ by at most one. Raises FitError when there are fewer experts than
        processes."""
        size = dist.get_world_size()
        if n < size:
            raise FitError(
                f"{n} experts can't be shared out over {size} processes: start torchrun with fewer"
            )
        bounds = tuple(n * at // size for at in range(size + 1))
        return cls(dist.get_rank(), bounds, device)

    def sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._add(tensor)
        return tensor

    def total(self, value: float) -> float:
        return float(self.sum(torch.tensor([value], dtype=torch.float64, device=self.device)))

    def average(self, mean: Tensor) -> Tensor:
        share = (self.rows.stop - self.rows.start) / self.bounds[-1]
        return self.sum(mean * share)

    def any(self, own: bool) -> bool:
        return self.total(float(own)) > 0

    def count(self, own: int) -> int:
        return self.bounds[-1]

    def same(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._send(tensor, 0)
        return tensor

    def agreed(self, value: float) -> float:
        return float(self.same(torch.tensor([value], dtype=torch.float64, device=self.device)))

    def gather(self, rows: Tensor) -> Tensor:
        whole = torch.zeros(self.bounds[-1], *rows.shape[1:], dtype=_summable(rows.dtype), device=self.device)
        whole[self.rows] = rows.to(whole)
        # zeros elsewhere: the sum is exact
        return self.sum(whole).to(device=rows.device, dtype=rows.dtype)

    def collect(self, rows: Tensor) -> Tensor:
        parts = []
        for source, (start, stop) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
            shape = (stop - start, *rows.shape[1:])
            part = rows if source == self.rank else torch.empty(shape, dtype=rows.dtype)
            part = part.to(self.device).contiguous()
            self._send(part, source)
            if self.rank == 0:
                parts.append(part.to(rows.device))
            del part
        return torch.cat(parts) if self.rank == 0 else rows

    def own(self, rows: Tensor) -> Tensor:
        return rows[self.rows]

    def within(self, start: int, stop: int) -> ShardedGroup:
        bounds = tuple(min(max(bound, start), stop) - start for bound in self.bounds)
        return type(self)(self.rank, bounds, self.device)

    def _add(self, tensor: Tensor) -> None:
        connected(lambda: dist.all_reduce(tensor))

    def _send(self, tensor: Tensor, source: int) -> None:
        # as bytes, since not every backend sends every dtype
        if tensor.numel():
            connected(lambda: dist.broadcast(tensor.view(-1).view(torch.uint8), source))


def _summable(dtype: torch.dtype) -> torch.dtype:
    """A dtype that holds the same numbers, and that every backend adds."""
    if dtype in (torch.float64, torch.int64):
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int32


def connected(call: Callable[[], _T]) -> _T:
    """Yield around an exchange. Raises FitError when another process is gone or late."""
    try:
        return call()
    except RuntimeError as error:
        raise FitError(
            "another process of this fit was killed (for want of memory, perhaps) or does not answer: the same command "
            "goes on from the last checkpoint"
        ) from error
