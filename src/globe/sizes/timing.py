"""How long a step takes here: the solver's own kernels, timed on a few random experts and extended to all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from globe.am.coding import propose_codes
from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.low_precision import curvature_dtype
from globe.am.dictionary.tangent import tangent
from globe.am.objective import evaluate
from globe.am.records import Sizes, StepOptions
from globe.am.state import AMState, Atoms, low_rank_atoms, start_state
from globe.config.choices import Activation
from globe.config.schema import Config
from globe.fit.reading import DTYPES
from globe.sizes.costs import EVALUATIONS, average_work, chunk_of, reference_seconds, usual_iterations

_EACH = 0.2
"""Seconds that each kernel is measured for; once more than that if a single call takes longer."""
_ITERATIONS = 4
"""Conjugate-gradient iterations that are timed together."""


def seconds_of_steps(config: Config, sizes: Sequence[Sizes], device: torch.device) -> dict[Sizes, float]:
    """Return the seconds of an average step of every one of these sizes.

    Those of one shape (n, p, d) are measured at one of them, the one whose work is in the middle, and extended in the
    proportion of the reference core's times, so that many candidates for large experts cost one measurement.
    """
    found: dict[Sizes, float] = {}
    for shape in dict.fromkeys((one.n, one.p, one.d) for one in sizes):
        alike = [one for one in dict.fromkeys(sizes) if (one.n, one.p, one.d) == shape]
        work = {one: reference_seconds(average_work(config, one)) for one in alike}
        middle = sorted(alike, key=work.__getitem__)[len(alike) // 2]
        seconds = seconds_per_step(config, middle, device)
        found |= {one: seconds * work[one] / work[middle] for one in alike}
    return found


def is_curved(config: Config) -> bool:
    """Return whether the activation is anything but linear at some time of the fit."""
    lam = config.schedule.lam
    return config.bank.activation is not Activation.identity and max(lam.start, lam.end) > 0


def seconds_per_step(config: Config, sizes: Sizes, device: torch.device) -> float:
    """Return an average step, from the solver's own kernels on a few random experts at the very p, d, m and r.

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
    bank, codes, options = state.atoms.bank, state.atoms.codes, _options(config)
    evaluated = _time(lambda: evaluate(X, bank, codes, options, into=state.point), device)
    coded = 1 / config.codes.every if config.codes.every else 0.0
    total = prepare + usual_iterations(config.train) * product
    total += (EVALUATIONS + 1 / config.train.evaluate_every + 2 * coded) * evaluated
    if coded:
        total += coded * _time(lambda: propose_codes(bank, codes, state.point), device)
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
    return start_state(X, atoms, _options(config)), X


def _options(config: Config) -> StepOptions:
    lam = config.schedule.lam.end if is_curved(config) else 0.0
    return StepOptions(str(config.bank.activation), lam=lam, lambda_A=config.train.lambda_A)


def _time(kernel: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call: the least of several rounds, since another program can only add to it."""
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
