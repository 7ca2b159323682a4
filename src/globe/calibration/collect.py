"""Statistics of experts as their module is called: float32 products, float64 sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from globe.calibration.experts_module import ExpertsView, Routed
from globe.calibration.statistics import LayerStatistics, SecondMoments


def rank_of(rank: int | None, size: int) -> int | None:
    """Return the rank of moments of `size` numbers where it saves something, or None for whole matrices."""
    return rank if rank is not None and 2 * rank < size else None


def buffered_rows(rank: int | None) -> int:
    """Return how many rows of an expert are gathered before they enter its sum.

    Adding q^2 sums costs as much as 100 rows of products. A decomposition of rank + rows vectors costs the cube of
    that, which is least for each row at half the rank.
    """
    return 256 if rank is None else max(64, rank // 2)


class MomentSums:
    """sum v v^T over the rows v that each of n experts is given, q numbers a row.

    With `rank` k only the k leading directions of each sum are kept, and the diagonal of the rest: whenever
    `buffered_rows` have come, they and the directions so far are cut to k by a singular value decomposition.
    """

    def __init__(
        self, n: int, q: int, *, rank: int | None = None, device: torch.device | None = None
    ) -> None:
        self._rank = rank
        self._buffer: Tensor | None = torch.empty(n, buffered_rows(rank), q, device=device)
        self._held = [0] * n
        self._sum = None if rank is not None else torch.zeros(n, q, q, dtype=torch.float64, device=device)
        self._factor = None if rank is None else torch.zeros(n, rank, q, device=device)
        size = 0 if rank is None else q
        self._diagonal = torch.zeros(n, size, dtype=torch.float64, device=device)

    def add(self, expert: int, rows: Float[Tensor, "t q"]) -> None:
        assert self._buffer is not None, "the sums are complete"
        room = self._buffer.shape[1]
        if self._sum is not None and len(rows) >= room:
            self._sum[expert] += rows.mT @ rows
            return
        while len(rows):
            held = self._held[expert]
            taken, rows = rows[: room - held], rows[room - held :]
            self._held[expert] = held + len(taken)
            self._buffer[expert, held : self._held[expert]] = taken
            if self._held[expert] == room:
                self._flush(expert)

    def complete(self) -> None:
        """Take up the rows gathered last, and free the room in which rows are gathered."""
        for expert in range(len(self._held)):
            self._flush(expert)
        self._buffer = None

    def finish(self, weights: Float[Tensor, " n"]) -> SecondMoments:
        """Return the sums divided by the weights of the experts, zeros where a weight is zero, and free them."""
        self.complete()
        share = torch.where(weights > 0, 1 / weights, 0.0)
        if self._sum is not None:
            self._sum *= share[:, None, None]
            matrix, self._sum = self._sum.float().cpu(), None
            return SecondMoments(matrix=matrix)
        assert self._factor is not None
        n, rank, q = self._factor.shape
        factor, diagonal = torch.empty(n, q, rank), torch.empty(n, q)
        for expert, rows in enumerate(self._factor):
            rest = (self._diagonal[expert] - rows.double().square().sum(0)).clamp_min(0)
            factor[expert] = (rows * share[expert].sqrt().float()).mT
            diagonal[expert] = rest * share[expert]
        self._factor = None
        return SecondMoments(factor=factor, diagonal=diagonal)

    def _flush(self, expert: int) -> None:
        held, self._held[expert] = self._held[expert], 0
        if not held:
            return
        assert self._buffer is not None
        rows = self._buffer[expert, :held]
        if self._sum is not None:
            self._sum[expert] += rows.mT @ rows
            return
        assert self._factor is not None
        assert self._rank is not None
        self._diagonal[expert] += rows.double().square().sum(0)
        both = torch.cat([self._factor[expert], rows])
        vectors = torch.linalg.eigh((both @ both.mT).double())[1][:, -self._rank :].float()
        torch.mm(vectors.mT, both, out=self._factor[expert])


class LayerSums:
    """The sums behind `LayerStatistics`, call by call."""

    def __init__(self, layer: int, view: ExpertsView, *, rank: int | None = None) -> None:
        self.layer, self.view = layer, view
        self._norms = view.down_energies()
        device = self._norms.device
        self._inputs = MomentSums(view.n, view.d, rank=rank_of(rank, view.d), device=device)
        self._inner = MomentSums(view.n, view.p, rank=rank_of(rank, view.p), device=device)
        self._vectors = torch.zeros(3, view.n, dtype=torch.float64, device=device)
        self._rows = torch.zeros(2, view.n, view.p, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take up one call of the experts module."""
        for routed in self.view.route(args, kwargs):
            self._add_expert(routed)

    def _add_expert(self, routed: Routed) -> None:
        expert, x, gate = routed
        h, by_up, by_gate = self.view.slopes(self.view.before_activation(expert, x))
        self._inputs.add(expert, x * gate[:, None])
        self._inner.add(expert, h * gate[:, None])
        squares = gate.square()
        for target, slope in zip(self._rows, (by_up, by_gate), strict=True):
            if slope is not None:
                target[expert] += (squares[:, None] * slope.square()).sum(0)
        norms = self.view.output(expert, h).norm(dim=1)
        sums = torch.stack([torch.ones_like(gate), squares, gate * norms])
        self._vectors[:, expert] += sums.double().sum(1)

    def finish(self) -> LayerStatistics:
        """Return the means; this object can't be used afterwards."""
        self._inputs.complete()
        self._inner.complete()
        counts, gate2, reap = self._vectors
        share = torch.where(gate2 > 0, 1 / gate2, 0.0)[:, None] * self._norms
        up, gate = ((rows * share).float().cpu() for rows in self._rows)
        return LayerStatistics(
            layer=self.layer,
            inputs=self._inputs.finish(gate2),
            inner=self._inner.finish(gate2),
            counts=counts.cpu(),
            gate2=gate2.cpu(),
            rows_up=up,
            rows_gate=gate if self.view.gated else None,
            reap=reap.cpu(),
        )


@contextmanager
def watched(module: nn.Module, sums: LayerSums) -> Iterator[None]:
    """Add every call of an experts module to the sums."""

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sums.add(args, kwargs)

    handle = module.register_forward_pre_hook(take, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
