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

BUFFERED = 256
"""Rows of an expert that are gathered before they are multiplied: adding d^2 sums costs as much as 100 of them."""


class MomentSums:
    """sum v v^T over the rows v that each of n experts is given, q numbers a row.

    With `rank` k only the k leading directions of each sum are kept, and the diagonal of the rest: whenever k rows or
    more have come, they and the directions so far are cut to k by a singular value decomposition.
    """

    def __init__(
        self, n: int, q: int, *, rank: int | None = None, device: torch.device | None = None
    ) -> None:
        self._rank = rank
        self._rows: list[list[Tensor]] = [[] for _ in range(n)]
        self._sum = None if rank is not None else torch.zeros(n, q, q, dtype=torch.float64, device=device)
        self._factor = None if rank is None else torch.zeros(n, rank, q, device=device)
        self._diagonal = torch.zeros(n, q, dtype=torch.float64, device=device)

    def add(self, expert: int, rows: Float[Tensor, "t q"]) -> None:
        held = self._rows[expert]
        held.append(rows)
        if sum(one.shape[0] for one in held) >= max(BUFFERED, self._rank or 0):
            self._flush(expert)

    def finish(self, weights: Float[Tensor, " n"]) -> SecondMoments:
        """Return the sums divided by the weights of the experts; zeros where a weight is zero."""
        for expert in range(len(self._rows)):
            self._flush(expert)
        share = torch.where(weights > 0, 1 / weights, 0.0)
        if self._sum is not None:
            self._sum *= share[:, None, None]
            return SecondMoments(matrix=self._sum.float().cpu())
        assert self._factor is not None
        rest = (self._diagonal - self._factor.double().square().sum(1)).clamp_min(0)
        factor = (self._factor * share.sqrt()[:, None, None].float()).mT.contiguous()
        return SecondMoments(factor=factor.cpu(), diagonal=(rest * share[:, None]).float().cpu())

    def _flush(self, expert: int) -> None:
        if not self._rows[expert]:
            return
        rows = torch.cat(self._rows[expert])
        self._rows[expert] = []
        if self._sum is not None:
            self._sum[expert] += rows.mT @ rows
            return
        assert self._factor is not None
        assert self._rank is not None
        self._diagonal[expert] += rows.double().square().sum(0)
        both = torch.cat([self._factor[expert], rows])
        _, vectors = torch.linalg.eigh((both @ both.mT).double())
        self._factor[expert] = vectors[:, -self._rank :].mT.float() @ both


class LayerSums:
    """The sums behind `LayerStatistics`, call by call."""

    def __init__(self, layer: int, view: ExpertsView, *, rank: int | None = None) -> None:
        self.layer, self.view = layer, view
        self._norms = view.down_energies()
        device = self._norms.device
        self._inputs = MomentSums(view.n, view.d, rank=_below(rank, view.d), device=device)
        self._inner = MomentSums(view.n, view.p, rank=_below(rank, view.p), device=device)
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


def _below(rank: int | None, size: int) -> int | None:
    """Return a rank that saves something, or None for whole matrices."""
    return rank if rank is not None and 2 * rank < size else None


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
