"""Successive halving over sizes that fill a budget, by short fits: what `bank.kept` chooses (m, r, atom_rank) with.

Steps, not seconds, are what a fit is given, and their number follows from a count of multiply-adds: equal seeds choose
equal sizes, on a busy machine as on an idle one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import Sizes
from globe.config.choices import Dictionary
from globe.config.console import progress_bar
from globe.config.schema import Config, is_linear
from globe.errors import FitError
from globe.fit.options import fit_options
from globe.fit.plan import BankSize, target_support
from globe.numerics.input_metric import InputMetric
from globe.numerics.metric import Metric
from globe.sizes.budget import Room, candidates, enlarged, neighbours
from globe.sizes.costs import average_work, reference_seconds
from globe.sizes.serving import Serving, served

_log = logging.getLogger(__name__)

FEWEST_STEPS = 12
"""Of a first fit. On 60 trained experts the order after 12 steps was nearly that after 70, the one after 5 was not."""
RATIO = 2.0
"""Steps of the first grid; the second rung looks halfway between the best candidates and their neighbours."""
KEPT_OF_FIRST, FINALISTS = 1 / 3, 3
"""What goes on: a third after the first rung, and three sizes into the last one."""
_SMALLEST_BLOCK = 12
"""Rows and columns; a smaller block of the experts has too few ranks to choose from."""
_SLACK = 0.6
"""The error falls by this share of what more is kept (log by log), around the best sizes."""


class Plan(NamedTuple):
    """What the time limit allows: in which block of the experts to look, and steps per rung."""

    room: Room
    first: tuple[BankSize, ...]
    steps: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Probe:
    """One candidate and its errors; fewer if it was left behind or came later."""

    size: BankSize
    parameters: int
    relfrob: dict[int, float | None]
    """by the steps it was fitted for; None for a fit that broke"""


@dataclass(frozen=True, slots=True)
class Frontier:
    """All that a search saw, and what it chose."""

    room: Room
    block: Room
    """what the probes were fitted to: `room`, or a block of fewer rows and columns"""
    steps: tuple[int, ...]
    probes: tuple[Probe, ...]
    chosen: BankSize
    """sizes for `room`"""


def plan_search(
    room: Room, config: Config, allows: Callable[[int], bool], serving: Serving | None = None
) -> Plan:
    """Plan rungs of equal cost within `budget.seconds` of the reference core.

    Where the experts are too large for even the fewest steps, a block of them stands for all: rows and columns in one
    proportion, in which the same share is kept by as many atoms. `room` must have a candidate that serves as asked.
    """
    low_rank = config.train.dictionary is Dictionary.gauss_newton
    factor = 1.0
    while True:
        block = room if factor == 1 else room.shrunk(factor)
        found = candidates(block, ratio=RATIO, low_rank=low_rank, allows=allows)
        first = served(found, serving, block.p, block.d)
        smallest = min(block.p, block.d) <= _SMALLEST_BLOCK
        if first:
            each = sum(_seconds(block, size, config) for size in first) / len(first)
            numbers = (len(first), _second(len(first)) + 4, FINALISTS)
            steps = [int(config.budget.seconds / 3 / number / each) for number in numbers]
            if steps[0] >= FEWEST_STEPS or smallest:
                most = config.train.steps
                rungs = [min(max(FEWEST_STEPS, step), most) for step in steps]
                return Plan(block, first, (rungs[0], max(rungs[:2]), max(rungs)))
        elif smallest:
            found = candidates(room, ratio=RATIO, low_rank=low_rank, allows=allows)
            return Plan(room, served(found, serving, room.p, room.d), (FEWEST_STEPS,) * 3)
        factor *= 2**0.5


def search(
    X: Float[Tensor, "n p d"],
    room: Room,
    config: Config,
    *,
    metric: InputMetric | None = None,
    seed: int,
    allows: Callable[[int], bool],
    serving: Serving | None = None,
) -> Frontier:
    """Fit the candidates to normalised experts for a few steps, the better third and what lies between for more steps,
    the best three for the most, and take the one with the least error, in the metric of the fit. Raises FitError if all
    break.
    """
    plan = plan_search(room, config, allows, serving)
    block = plan.room
    if block is not room:
        X, metric = block_of(X, metric, block, seed)
    columns = None
    if metric is not None:
        X = metric.seen(X, slice(0, len(X)))
        columns = metric.kernel(linear=is_linear(config))
    seen: dict[BankSize, dict[int, float]] = {}
    running = list(plan.first)
    for rung, steps in enumerate(plan.steps):
        _log.info("trying %d sizes on %d experts of %d x %d for %d steps", len(running), *X.shape, steps)
        with progress_bar(len(running), "fit", f"sizes, round {rung + 1} of {len(plan.steps)}") as bar:
            for size in running:
                tried = seen.setdefault(size, {})
                if steps not in tried:
                    tried[steps] = short_error(X, columns, block, size, config, steps, seed)
                bar.update()
        merits = {size: _merit(block, size, seen[size][steps], block is not room) for size in running}
        running.sort(key=merits.__getitem__)
        if rung == 0:
            leaders = running[: _second(len(running))]
            between = served(_halfway(block, leaders, tuple(seen), allows), serving, block.p, block.d)
            running = [*leaders, *(size for size in between if size not in seen)]
        else:
            running = running[:FINALISTS]
    if not math.isfinite(merits[running[0]]):
        raise FitError(
            "no size within bank.kept could be fitted: use dtype=float64, or give bank.m and bank.r"
        )
    probes = tuple(probe_of(size, block, tried) for size, tried in seen.items())
    chosen = running[0]
    if block is not room:
        whole = enlarged(room, chosen, block, allows=allows)
        # rounded in the block, it may serve there alone: then the first size that serves whole
        (chosen, *_) = served(
            (whole, *candidates(room, ratio=RATIO, low_rank=False, allows=allows)), serving, room.p, room.d
        )
    return Frontier(room, block, plan.steps, probes, chosen)


def probe_of(size: BankSize, block: Room, tried: dict[int, float]) -> Probe:
    """Return the record of a candidate, from its errors by steps, infinite where a fit broke."""
    relfrob = {steps: error if math.isfinite(error) else None for steps, error in tried.items()}
    return Probe(size, block.parameters(size), relfrob)


def _halfway(
    room: Room, leaders: Sequence[BankSize], seen: Sequence[BankSize], allows: Callable[[int], bool]
) -> tuple[BankSize, ...]:
    """Return the candidates around the best dense and the best low-rank one."""
    best = {size.atom_rank is None: size for size in reversed(leaders)}
    found = [one for size in best.values() for one in neighbours(room, size, seen, allows=allows)]
    return tuple(dict.fromkeys(found))


def _second(first: int) -> int:
    return max(2, math.ceil(first * KEPT_OF_FIRST))


def _seconds(room: Room, size: BankSize, config: Config) -> float:
    sizes = Sizes(room.n, room.p, room.d, size.m, size.r, atom_rank=size.atom_rank)
    return reference_seconds(average_work(config, sizes))


def short_error(
    X: Float[Tensor, "n p d"],
    metric: Metric | None,
    room: Room,
    size: BankSize,
    config: Config,
    steps: int,
    seed: int,
) -> float:
    """Return RelFrob after `steps` steps of the very fit that is asked for; infinity where it breaks."""
    support = target_support(config, size.m)
    sizes = Sizes(room.n, room.p, room.d, size.m, size.r, target_support=support, atom_rank=size.atom_rank)
    train = replace(config.train, steps=steps, time_limit=None, patience=0, checkpoint_every=1e9)
    generator = torch.Generator().manual_seed(seed)
    try:
        options = fit_options(replace(config, train=train))
        return fit_bank(X, sizes, options, metric=metric, generator=generator).relfrob
    except (FitError, torch.linalg.LinAlgError) as error:
        _log.warning("sizes %s are left out: %s", size.text, error)
        return math.inf


def _merit(room: Room, size: BankSize, error: float, at_equal_budget: bool) -> float:
    """Return the error; in a block, whose sizes are coarse, what it would be if the budget were filled."""
    used = room.parameters(size) / room.limit
    return error * (used**_SLACK if at_equal_budget else 1.0)


def block_of(
    X: Float[Tensor, "n p d"], metric: InputMetric | None, block: Room, seed: int
) -> tuple[Float[Tensor, "n q c"], InputMetric | None]:
    """Return random columns, the same for all experts, and random rows of each, with their part of the metric."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randperm(X.shape[2], generator=generator)[: block.d].to(X.device)
    rows = [torch.randperm(X.shape[1], generator=generator)[: block.p].to(X.device) for _ in X]
    part = torch.stack([expert[chosen][:, columns] for expert, chosen in zip(X, rows, strict=True)])
    return part, None if metric is None else metric.block(torch.stack(rows), columns)
