"""The training loop of the gradient baselines: fused Adam(W), full batch, the best state kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from globe.am.records import StopReason
from globe.baselines.records import BaselinePoint
from globe.errors import FitError

EVALUATE_EVERY = 10
"""Steps between two measured states. The public scripts look every 200 steps, which loses short runs."""


@runtime_checkable
class Objective(Protocol):
    """What is trained. `parameters` are leaves with `.grad` allocated."""

    @property
    def parameters(self) -> Sequence[Tensor]: ...

    def forward(self) -> None:
        """Compute the residual of the present parameters."""

    def relfrob(self) -> float:
        """Return RelFrob of the last `forward`."""

    def backward(self) -> None:
        """Write the gradient at the last `forward` into `.grad`."""


class Limits(NamedTuple):
    """When a fit ends, whichever comes first, and who watches."""

    steps: int | None = None
    seconds: float | None = None
    on_step: Callable[[BaselinePoint], None] | None = None
    """called with every measured state"""
    evaluate_every: int = EVALUATE_EVERY
    clock: Callable[[], float] = time.perf_counter
    """what counts as seconds; `time.process_time` for one thread on a machine with other work"""
    started: float = 0.0
    """reading of `clock` at the start of the method"""

    def elapsed(self) -> float:
        return self.clock() - self.started

    def fraction(self, step: int, elapsed: float) -> float:
        """Return the share of the way that has passed: of steps or of time, the larger where both are limited."""
        return max(step / self.steps if self.steps else 0.0, elapsed / self.seconds if self.seconds else 0.0)

    def stop(self, step: int, elapsed: float) -> StopReason | None:
        if self.steps is not None and step >= self.steps:
            return StopReason.steps
        if self.seconds is not None and elapsed >= self.seconds:
            return StopReason.time
        return None


class AdamOutcome(NamedTuple):
    best: tuple[Tensor, ...]
    """parameters of the measured state with the least error"""
    history: tuple[BaselinePoint, ...]
    stop: StopReason


def cosine_rate(rate: float, *, floor: float, fraction: float) -> float:
    """Return floor + (rate - floor) (1 + cos(pi fraction)) / 2; fraction of the way, 0 to 1."""
    return floor + (rate - floor) * (1 + math.cos(math.pi * min(1.0, fraction))) / 2


@cache
def load_optimiser() -> None:
    """Take one step of nothing, before any clock: at the first one PyTorch imports its compiler for seconds."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.ones(1)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()


@torch.no_grad()
def minimise(
    objective: Objective,
    limits: Limits,
    *,
    rates: Sequence[float],
    weight_decay: float = 0.0,
    cosine_floor: float | None = None,
) -> AdamOutcome:
    """Minimise by Adam, or AdamW where there is decay (betas 0.9, 0.999; eps 1e-8), until a limit is reached.

    rates          learning rate of each parameter
    cosine_floor   None keeps the rates; else all fall to this floor on a cosine over `limits.fraction`

    A state is measured before its own update, so the state kept is the state whose error is reported. Raises
    FitError when the very first error is not finite; later on the fit ends as `diverged` with its best state.
    """
    groups = [
        {"params": [parameter], "lr": rate}
        for parameter, rate in zip(objective.parameters, rates, strict=True)
    ]
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    optimiser = kind(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True)
    best = tuple(torch.empty_like(parameter) for parameter in objective.parameters)
    least = math.inf
    history: list[BaselinePoint] = []
    step = 0
    while True:
        elapsed = limits.elapsed()
        stop = limits.stop(step, elapsed)
        objective.forward()
        if stop or step % limits.evaluate_every == 0:
            error = objective.relfrob()
            if not math.isfinite(error):
                stop = StopReason.diverged
                break
            history.append(BaselinePoint(step, limits.elapsed(), error))
            if limits.on_step:
                limits.on_step(history[-1])
            if error < least:
                least = error
                for kept, parameter in zip(best, objective.parameters, strict=True):
                    kept.copy_(parameter)
            if stop:
                break
        if cosine_floor is not None:
            fraction = limits.fraction(step, elapsed)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = cosine_rate(rate, floor=cosine_floor, fraction=fraction)
        objective.backward()
        optimiser.step()
        step += 1
    if not history:
        raise FitError("the first error of the fit is not finite: check the experts for inf, nan or overflow")
    return AdamOutcome(best, tuple(history), stop)


def leaf(start: Tensor) -> Tensor:
    """Return a trainable copy of `start` with its gradient buffer."""
    parameter = start.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
