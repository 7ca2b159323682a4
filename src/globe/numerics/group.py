"""Experts shared out over processes: what has to be added up, and what has to be the same everywhere.

Every rank holds a slice of the experts with their adapters, codes and bases, and a copy of the bank. Sums over experts
become sums over processes; what is computed on every process from such sums is taken from process 0 where a rounding
that differs between machines could lead processes to different decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from globe.errors import FitError

_T = TypeVar("_T")


class ProcessGroup:
    """The processes that share the experts of a bank, with experts `bounds[rank]` to `bounds[rank + 1]` on each.

    Without bounds it is one process that holds all of them: nothing is added up, nothing is sent. With several, all of
    them must make the same calls in the same order.
    """

    def __init__(
        self, rank: int = 0, bounds: tuple[int, ...] = (), device: torch.device | None = None
    ) -> None:
        self.rank, self.bounds, self.device = rank, bounds, device
        self.rows = slice(bounds[rank], bounds[rank + 1]) if bounds else slice(None)

    @classmethod
    def of(cls, n: int, device: torch.device) -> ProcessGroup:
        """Return torch.distributed's default group with n experts in slices that differ by at most one.

        Raises FitError when there are fewer experts than processes.
        """
        size = dist.get_world_size()
        if n < size:
            raise FitError(
                f"{n} experts can't be shared out over {size} processes: start torchrun with fewer"
            )
        bounds = tuple(n * at // size for at in range(size + 1))
        return cls(dist.get_rank(), bounds, device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over processes, on all of them; the given tensor may be overwritten by it."""
        if self.bounds:
            tensor = tensor.contiguous()
            self._add(tensor)
        return tensor

    def total(self, value: float) -> float:
        """Return the sum of one number over processes."""
        return float(self.sum(self._number(value))) if self.bounds else value

    def average(self, mean: Tensor) -> Tensor:
        """Return the mean over all experts, from the means over the experts of each process."""
        if not self.bounds:
            return mean
        return self.sum(mean * ((self.rows.stop - self.rows.start) / self.bounds[-1]))

    def any(self, own: bool) -> bool:
        """Say whether it holds on some process."""
        return self.total(float(own)) > 0

    def count(self, own: int) -> int:
        """Return the number of experts of all processes."""
        return self.bounds[-1] if self.bounds else own

    def same(self, tensor: Tensor) -> Tensor:
        """Return process 0's tensor, on all processes; the given one may be overwritten by it."""
        if self.bounds:
            tensor = tensor.contiguous()
            self._send(tensor, 0)
        return tensor

    def agreed(self, value: float) -> float:
        """Return process 0's number."""
        return float(self.same(self._number(value))) if self.bounds else value

    def gather(self, rows: Tensor) -> Tensor:
        """Return every expert's row, from the rows of each process; for what is small."""
        if not self.bounds:
            return rows
        whole = torch.zeros(self.bounds[-1], *rows.shape[1:], dtype=_summable(rows.dtype), device=self.device)
        whole[self.rows] = rows.to(whole)
        # zeros elsewhere: the sum is exact
        return self.sum(whole).to(device=rows.device, dtype=rows.dtype)

    def collect(self, rows: Tensor) -> Tensor:
        """Do the same on process 0 alone; other processes get their own rows back."""
        parts = []
        for source, (start, stop) in enumerate(pairwise(self.bounds)):
            shape = (stop - start, *rows.shape[1:])
            part = rows if source == self.rank else torch.empty(shape, dtype=rows.dtype)
            part = part.to(self.device).contiguous()
            self._send(part, source)
            if self.rank == 0:
                parts.append(part.to(rows.device))
            del part
        return torch.cat(parts) if parts else rows

    def own(self, rows: Tensor) -> Tensor:
        """Return this process's part of every expert's rows."""
        return rows[self.rows]

    def within(self, start: int, stop: int) -> ProcessGroup:
        """Return the same processes for the experts `start` to `stop` of these, one member of a bank."""
        bounds = tuple(min(max(bound, start), stop) - start for bound in self.bounds)
        return type(self)(self.rank, bounds, self.device) if bounds else self

    def _number(self, value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64, device=self.device)

    def _add(self, tensor: Tensor) -> None:
        connected(lambda: dist.all_reduce(tensor))

    def _send(self, tensor: Tensor, source: int) -> None:
        # as bytes, since not every backend sends every dtype
        if tensor.numel():
            connected(lambda: dist.broadcast(tensor.view(-1).view(torch.uint8), source))


ALONE = ProcessGroup()


def _summable(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype that holds the same numbers, and that every backend adds."""
    if dtype in (torch.float64, torch.int64):
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int32


def connected(call: Callable[[], _T]) -> _T:
    """Return what an exchange gives. Raises FitError when another process is gone or late."""
    try:
        return call()
    except RuntimeError as error:
        raise FitError(
            "another process of this fit was killed (for want of memory, perhaps) or does not answer: the same command "
            "goes on from the last checkpoint"
        ) from error
