"""A search among sizes that fill a budget, by short fits: what `bank.kept` chooses (m, r, atom_rank) with.

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
from globe.sizes.budget import Room, candidates, neighbours, resized
from globe.sizes.costs import average_work, reference_seconds
from globe.sizes.serving import Serving, served

_log = logging.getLogger(__name__)

FEWEST_STEPS, FEWEST_AT_LAST = 12, 20
"""Of a first fit and of a last one. On 60 trained experts the order after 12 steps was nearly that after 70, the one
after 5 was not; the best few of those take more to tell apart."""
RATIO = 2.0
"""Steps of the first grid; then come those halfway between the best candidates and their neighbours."""
KEPT_OF_FIRST, FINALISTS = 1 / 3, 4
"""Share of the grid whose neighbours are looked at, and how many sizes are fitted once more."""
_BETWEEN = 4
"""Sizes between those of the grid, at most."""
_FIRST_SHARE = 1 / 2
"""Of the time for the first fits; the last ones tell sizes apart that differ by little, in larger blocks and longer."""
_SMALLEST_BLOCK = 12
"""Rows and columns; a smaller block of the experts has too few ranks to choose from."""
_SLACK = 0.6
"""The error falls by this share of what more is kept (log by log), around the best sizes."""


class Rung(NamedTuple):
    """In which block of the experts sizes are fitted, and for how many steps."""

    block: Room
    steps: int


class Plan(NamedTuple):
    """What the time limit allows. Sizes are those of the whole experts."""

    first: tuple[BankSize, ...]
    look: Rung
    last: Rung


@dataclass(frozen=True, slots=True)
class Probe:
    """A size of the whole experts and the error of its fit."""

    size: BankSize
    relfrob: float | None
    """in a block, whose sizes are coarse, what it would be if the budget were filled; None for a fit that broke"""


@dataclass(frozen=True, slots=True)
class Round:
    """Sizes that were fitted alike."""

    block: Room
    steps: int
    probes: tuple[Probe, ...]


@dataclass(frozen=True, slots=True)
class Frontier:
    """All that a search saw, and what it chose."""

    room: Room
    rounds: tuple[Round, ...]
    chosen: BankSize


def plan_search(
    room: Room, config: Config, allows: Callable[[int], bool], serving: Serving | None = None
) -> Plan:
    """Plan the fits within `budget.seconds` of the reference core. `room` must have a candidate that serves as asked.

    Where the experts are too large for even the fewest steps, a block of them stands for all: rows and columns in one
    proportion, in which the same share is kept by as many atoms.
    """
    low_rank = config.train.dictionary is Dictionary.gauss_newton
    first = served(candidates(room, ratio=RATIO, low_rank=low_rank, allows=allows), serving, room.p, room.d)

    def rung(number: int, fewest: int, seconds: float) -> Rung:
        factor, block = 1.0, room
        while True:
            sizes = [resized(block, size, room, allows=allows) for size in first]
            each = sum(_seconds(block, size, config) for size in sizes) / len(sizes)
            steps = int(seconds / number / each)
            factor *= 2**0.5
            smaller = room.shrunk(factor)
            small = min(block.p, block.d) <= _SMALLEST_BLOCK or smaller.dense(1, allows) is None
            if steps >= fewest or small:
                return Rung(block, min(max(fewest, steps), config.train.steps))
            block = smaller

    look = rung(len(first) + _BETWEEN, FEWEST_STEPS, config.budget.seconds * _FIRST_SHARE)
    last = rung(FINALISTS, FEWEST_AT_LAST, config.budget.seconds * (1 - _FIRST_SHARE))
    return Plan(first, look, last)


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
    """Fit the candidates to normalised experts for a few steps, then what lies between the best of them, then the best
    four for more steps in as large a block as the time allows, and take the one with the least error, in the metric of
    the fit. Raises FitError if all break.
    """
    plan = plan_search(room, config, allows, serving)

    def errors(rung: Rung, sizes: Sequence[BankSize], name: str) -> dict[BankSize, float]:
        _log.info("trying %d sizes on %d experts of %s", len(sizes), room.n, described(rung, room))
        part, columns = _seen(X, metric, rung.block, room, config, seed)
        found: dict[BankSize, float] = {}
        known: dict[BankSize, float] = {}
        with progress_bar(len(sizes), "fit", f"sizes, {name}") as bar:
            for size in sizes:
                own = resized(rung.block, size, room, allows=allows)
                if own not in known:
                    known[own] = short_error(part, columns, rung.block, own, config, rung.steps, seed)
                found[size] = _merit(rung.block, own, known[own], rung.block != room)
                bar.update()
        return found

    looked = errors(plan.look, plan.first, "first look")
    leaders = sorted(looked, key=looked.__getitem__)[: max(2, math.ceil(len(looked) * KEPT_OF_FIRST))]
    between = served(_halfway(room, leaders, plan.first, allows), serving, room.p, room.d)
    if between:
        looked |= errors(plan.look, between, "in between")
    rounds, found = [_round(plan.look, looked)], looked
    if plan.last != plan.look:
        found = errors(plan.last, sorted(looked, key=looked.__getitem__)[:FINALISTS], "the best")
        rounds.append(_round(plan.last, found))
    chosen = min(found, key=found.__getitem__)
    if not math.isfinite(found[chosen]):
        raise FitError(
            "no size within bank.kept could be fitted: use dtype=float64, or give bank.m and bank.r"
        )
    return Frontier(room, tuple(rounds), chosen)


def described(rung: Rung | Round, room: Room) -> str:
    """Return the block and the steps in words."""
    whole = "" if rung.block == room else "blocks of "
    return f"{whole}{rung.block.p} x {rung.block.d}, {rung.steps} steps"


def _round(rung: Rung, found: dict[BankSize, float]) -> Round:
    return Round(rung.block, rung.steps, probes_of(found))


def probes_of(found: dict[BankSize, float]) -> tuple[Probe, ...]:
    """Return the records of sizes and their errors, infinite where a fit broke."""
    return tuple(Probe(size, error if math.isfinite(error) else None) for size, error in found.items())


def _halfway(
    room: Room, leaders: Sequence[BankSize], seen: Sequence[BankSize], allows: Callable[[int], bool]
) -> tuple[BankSize, ...]:
    """Return the candidates around the best dense and the best low-rank one."""
    best = {size.atom_rank is None: size for size in reversed(leaders)}
    found = [one for size in best.values() for one in neighbours(room, size, seen, allows=allows)]
    return tuple(dict.fromkeys(found))


def _seconds(room: Room, size: BankSize, config: Config) -> float:
    sizes = Sizes(room.n, room.p, room.d, size.m, size.r, atom_rank=size.atom_rank)
    return reference_seconds(average_work(config, sizes))


def _seen(
    X: Float[Tensor, "n p d"], metric: InputMetric | None, block: Room, room: Room, config: Config, seed: int
) -> tuple[Float[Tensor, "n q c"], Metric | None]:
    """Return a block of the experts as the metric sees it, and what a fit has to know of the metric."""
    if block != room:
        X, metric = block_of(X, metric, block, seed)
    if metric is None:
        return X, None
    return metric.seen(X, slice(0, len(X))), metric.kernel(linear=is_linear(config))


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
