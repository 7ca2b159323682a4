"""`dry_run=true`: sizes, kept shares, peak memory and seconds per step of every bank, predicted without a fit.

Memory is counted (`globe.sizes.costs`). Time is measured on the solver's own kernels with a few random experts, about a
second for small banks, and extended to all experts. What is predicted is a GloBE fit by Gauss-Newton steps; the other
methods show their sizes and what they keep.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from globe.am.coding import propose_codes
from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.low_precision import curvature_dtype
from globe.am.dictionary.tangent import tangent
from globe.am.objective import evaluate
from globe.am.records import Sizes
from globe.am.state import AMState, Atoms, low_rank_atoms, start_state
from globe.checkpoint import Checkpoint, open_checkpoint
from globe.config.choices import Activation, Method, Store
from globe.config.console import add_row, new_table, say, wide_console
from globe.config.schema import Config
from globe.fit.plan import BankPlan, Outline, outline, plan_bank
from globe.fit.reading import DTYPES
from globe.numerics.device import arithmetic, limit_threads, peak_host_bytes
from globe.sizes.chosen import room_of
from globe.sizes.costs import EVALUATIONS, chunk_of, fit_bytes, usual_iterations
from globe.sizes.search import plan_search

_EACH = 0.2
"""Seconds that each kernel is measured for; once more than that if a single call takes longer."""
_LATER = 40 * 2**20
"""Bytes of what a fit loads only when it needs it, scipy's solvers above all."""
_ITERATIONS = 4
"""Of conjugate gradients, timed together."""


@dataclass(frozen=True, slots=True)
class Prediction:
    bank: BankPlan
    bytes: int | None
    """peak, of the process on a CPU and of the device on another; None where it is not predicted"""
    seconds: float | None
    """per step"""


def predict(config: Config, checkpoint: Checkpoint, device: torch.device) -> tuple[Prediction, ...]:
    """Every bank of a run. With `bank.kept` the sizes are still to be chosen: every candidate of the first rung, once
    for each shape.
    """
    banks = [bank for one in outline(config, checkpoint) for bank in _plans(config, one)]
    if config.method is Method.globe and config.bank.kept is not None:
        banks = list({(bank.outline.shape, bank.sizes): bank for bank in banks}.values())
    base = _resident_bytes() + _LATER if device.type == "cpu" else 0
    steps: dict[Sizes, float] = {}
    found = []
    for bank in banks:
        if config.method is not Method.globe:
            found.append(Prediction(bank, None, None))
            continue
        if bank.sizes not in steps:
            steps[bank.sizes] = seconds_per_step(config, bank.sizes, device)
        found.append(Prediction(bank, base + bytes_of(config, checkpoint, bank), steps[bank.sizes]))
    return tuple(found)


def _resident_bytes() -> int:
    """Memory of the process as it is now. Its peak so far is more where the system counts that of its parent."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_host_bytes() or 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _plans(config: Config, bank: Outline) -> list[BankPlan]:
    if config.method is Method.globe and config.bank.kept is not None:
        first = plan_search(room_of(config, bank), config, lambda m: True).first
        return [plan_bank(config, bank, size) for size in first]
    return [plan_bank(config, bank)]


def bytes_of(config: Config, checkpoint: Checkpoint, bank: BankPlan) -> int:
    return fit_bytes(
        bank.sizes,
        itemsize=DTYPES[config.dtype].itemsize,
        source_itemsize=checkpoint.dtype(*bank.members[0]).itemsize,
        curved=_curved(config),
        joint=config.codes.joint,
        members=len(bank.members),
        stored=config.normalise.store is Store.checkpoint,
    )


def _curved(config: Config) -> bool:
    lam = config.schedule.lam
    return config.bank.activation is not Activation.identity and max(lam.start, lam.end) > 0


def seconds_per_step(config: Config, sizes: Sizes, device: torch.device) -> float:
    """An average step, from the solver's own kernels on a few random experts at the very p, d, m and r.

    Every kernel's time is a part for each expert and a part for the atoms, so two numbers of experts give both; where
    all experts are few, they are measured as they are. Products are in the precision that the fit begins with.
    """
    few = min(sizes.n, 2 * chunk_of(sizes, itemsize=2))
    whole = _timed_step(config, replace(sizes, n=few), device)
    if few == sizes.n:
        return whole
    half = _timed_step(config, replace(sizes, n=few // 2), device)
    each = max(0.0, whole - half) / (few - few // 2)
    return whole + each * (sizes.n - few)


def _timed_step(config: Config, sizes: Sizes, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    state, X = _random_state(config, sizes, device)
    inner = curvature_dtype(config.train.curvature_dtype, X)
    lam, activation = state.lam, str(config.bank.activation)

    def direction(iterations: int) -> float:
        atoms = state.atoms

        def solve() -> None:
            slopes = tangent(
                atoms.bank, atoms.codes, left=atoms.left, right=atoms.right, joint=config.codes.joint
            )
            gauss_newton_direction(
                slopes,
                state.point,
                cg_iterations=iterations,
                damping=config.train.damping,
                generator=generator,
                curvature_dtype=inner,
            )

        return _time(solve, device)

    prepare = direction(0)
    product = max(0.0, direction(_ITERATIONS) - prepare) / _ITERATIONS
    evaluated = _time(
        lambda: evaluate(
            X,
            state.atoms.bank,
            state.atoms.codes,
            lam=lam,
            activation=activation,
            lambda_A=config.train.lambda_A,
            into=state.point,
        ),
        device,
    )
    coded = 1 / config.codes.every if config.codes.every else 0.0
    total = prepare + usual_iterations(config.train) * product
    total += (EVALUATIONS + 1 / config.train.evaluate_every + 2 * coded) * evaluated
    if coded:
        total += coded * _time(
            lambda: propose_codes(state.atoms.bank, state.atoms.codes, state.point), device
        )
    return total


def _random_state(
    config: Config, sizes: Sizes, device: torch.device
) -> tuple[AMState, Float[Tensor, "n p d"]]:
    generator = torch.Generator().manual_seed(0)
    dtype, k = DTYPES[config.dtype], sizes.atom_rank

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    X = normal(sizes.n, sizes.p, sizes.d)
    codes = normal(sizes.n, sizes.m).abs()
    if k is None:
        atoms = Atoms(0.2 * normal(sizes.m, sizes.r, sizes.d), codes)
    else:
        atoms = low_rank_atoms(0.2 * normal(sizes.m, sizes.r, k), normal(sizes.m, k, sizes.d), codes)
    lam = config.schedule.lam.end if _curved(config) else 0.0
    activation, ridge = str(config.bank.activation), config.train.lambda_A
    return start_state(X, atoms, lam=lam, activation=activation, lambda_A=ridge), X


def _time(kernel: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the least of several rounds, since another program can only add to it."""
    kernel()
    best, count, started = float("inf"), 1, time.perf_counter()
    while True:
        _wait(device)
        clock = time.perf_counter()
        for _ in range(count):
            kernel()
        _wait(device)
        spent = time.perf_counter() - clock
        best = min(best, spent / count)
        if time.perf_counter() - started > _EACH:
            return best
        if spent < _EACH / 20:
            count *= 2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dry_run(config: Config, console: Console | None = None) -> tuple[Prediction, ...]:
    """Open the checkpoint, predict, print the table. Raises ConfigError or CheckpointError as a run would."""
    console = wide_console(console)
    with arithmetic(config) as device:
        checkpoint = open_checkpoint(
            config.model.path, revision=config.model.revision, force_download=config.model.force_download
        )
        limit_threads(config, max(bank.n * bank.p * bank.d for bank in outline(config, checkpoint)))
        found = predict(config, checkpoint, device)
    console.print(_table(config, found, str(device)))
    if config.method is Method.globe and config.bank.kept is not None:
        say(
            console,
            f"bank.kept={config.bank.kept} chooses among these by short fits that take about "
            f"{config.budget.seconds:g} s (budget.seconds) for each shape",
        )
    return found


def _table(config: Config, found: tuple[Prediction, ...], device: str) -> Table:
    figures = ("kept of\nfamily", "peak\nmemory", "seconds\nper step", "seconds\nat most")
    title = f"dry run of {config.method} on {device}: nothing is fitted"
    table = new_table(title, ("bank", "n x p x d", "m", "r", "k", *figures))
    for one in found:
        sizes = one.bank.sizes
        limit = config.train.time_limit
        longest = None if one.seconds is None else one.seconds * config.train.steps
        if longest is not None and limit is not None:
            longest = min(longest, limit)
        cells = (
            one.bank.key,
            f"{sizes.n} x {sizes.p} x {sizes.d}",
            str(sizes.m),
            str(sizes.r),
            "-" if sizes.atom_rank is None else str(sizes.atom_rank),
            f"{one.bank.kept:.1%}",
            "-" if one.bytes is None else f"{one.bytes / 2**20:,.0f} MiB",
            "-" if one.seconds is None else f"{one.seconds:.3g}",
            "-" if longest is None else f"{longest:,.0f}",
        )
        add_row(table, cells)
    return table
