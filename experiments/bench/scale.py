"""How a step's seconds and a fit's memory grow, and how near to the machine's peak it runs: `make bench-scale`.

    python experiments/bench/scale.py                                   # doublings, then the real shapes; half an hour
    python experiments/bench/scale.py --only doublings
    python experiments/bench/scale.py --only shapes --shapes 60x1408x2048 --steps 2
    python experiments/bench/scale.py --only reach --reach 60x352x512   # ten minutes

Doublings: n, p, d, r and m are doubled twice, one at a time, from a small bank. Exponents are slopes of log (seconds
or bytes) against log (size); beside them stand those of the counted multiply-adds and of the counted memory
(`globe.sizes.costs`), over the same points. Shapes: one fit of a few steps on weights with decaying spectra and a
shared
part, made on the spot, with its peak memory above the process after its imports; then the rate of the
conjugate-gradient loop, in multiply-adds that the method needs, against the fastest large product of the same dtype in
the same process. Reach: seconds until a fit is within 2 % of the error that float32 has after 40 steps, with products
of the curvature in float32 and as `train.curvature_dtype=auto` takes them. Each measurement has a process of its own.
Seconds are CPU seconds of one thread, wall-clock with more. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from globe.am.dictionary.curvature import Curvature
from globe.am.dictionary.gauss_newton import gauss_newton_direction
from globe.am.dictionary.low_precision import curvature_dtype
from globe.am.dictionary.tangent import tangent
from globe.am.loop import fit_bank
from globe.am.records import Move, Sizes, StepOptions
from globe.am.state import AMState, Atoms, start_state
from globe.config.schema import Config
from globe.fit.normalise import normalise
from globe.fit.options import fit_options
from globe.sizes.costs import fit_bytes, step_work

BASE = {"n": 32, "p": 352, "d": 512, "r": 88, "m": 8}
ITERATIONS = 10
"""Of conjugate gradients in a step, none left out, so that all steps cost the same."""
REACHED = 1.02
"""Of the error at the end: where a fit counts as done."""
LARGE = 4096
"""Rows and columns of the product whose rate is the peak."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("doublings", "shapes", "reach"))
    parser.add_argument("--shapes", nargs="+", default=["60x1408x2048", "128x768x2048"])
    parser.add_argument("--steps", type=int, default=2, help="of the fits of the real shapes")
    parser.add_argument("--reach", default="60x352x512", help="shape of the fits whose time is taken")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=12.0, help="GiB that a fit may take")
    parser.add_argument(
        "--share", type=float, default=0.6, help="of the peak rate that the loop should reach"
    )
    parser.add_argument("--child", choices=("fit", "rate", "reach"), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="auto", help=argparse.SUPPRESS)
    return parser.parse_args()


def clock(threads: int) -> float:
    return time.process_time() if threads == 1 else time.perf_counter()


def trained_like(n: int, p: int, d: int) -> torch.Tensor:
    """Experts with power-law spectra: a part that four groups share, and one of their own."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(1, p + 1).pow(-0.5)[:, None]

    def matrix() -> torch.Tensor:
        right = decay * torch.randn(p, d, generator=generator)
        return torch.randn(p, p, generator=generator) @ right

    shared = [matrix() for _ in range(4)]
    W = torch.empty(n, p, d)
    for i in range(n):
        torch.add(matrix(), shared[i % 4], out=W[i])
    return W.mul_(0.02 / float(W[0].std()))


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def fixed(steps: int, dtype: str) -> Config:
    config = Config()
    config.train.steps, config.train.patience = steps, 0
    config.train.cg_iterations, config.train.cg_tolerance = ITERATIONS, 0.0
    config.train.curvature_dtype = dtype
    return config


def child_fit(sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """One fit: seconds of a step after the first, bytes above the imports, errors before and after."""
    idle = status("VmRSS")
    normalised = normalise(trained_like(sizes.n, sizes.p, sizes.d), centre="scalar", scale="family")
    X = normalised.experts
    del normalised
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the fit, not of making the weights
    stamps: list[float] = []
    result = fit_bank(
        X,
        sizes,
        fit_options(fixed(options.steps, options.dtype)),
        generator=torch.Generator().manual_seed(0),
        on_step=lambda record: stamps.append(clock(options.threads)),
    )
    each = min(after - before for before, after in pairwise(stamps))
    peak = status("VmHWM") - idle
    return {"seconds": each, "bytes": peak, "before": result.relfrob_start, "after": result.relfrob}


def child_reach(sizes: Sizes, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Return the seconds and the error after every step of a fit with the default options."""
    X = normalise(trained_like(sizes.n, sizes.p, sizes.d), centre="scalar", scale="family").experts
    config = Config()
    config.train.steps, config.train.patience, config.train.curvature_dtype = options.steps, 0, options.dtype
    trace: list[tuple[float, float]] = []
    started = clock(options.threads)
    fit_bank(
        X,
        sizes,
        fit_options(config),
        generator=torch.Generator().manual_seed(0),
        on_step=lambda record: trace.append((clock(options.threads) - started, record.relfrob)),
    )
    return trace


def iteration_seconds(loop: Callable[[], None], now: Callable[[], float]) -> float:
    """Return the shortest time between two products with the curvature, one of which every iteration makes.

    A difference of two whole loops would hold all that disturbs either, and can come out negative.
    """
    stamps: list[float] = []
    product = Curvature.product

    def stamped(self: Curvature, move: Move) -> Move:
        stamps.append(now())
        return product(self, move)

    with patch.object(Curvature, "product", stamped):
        loop()
    return min(after - before for before, after in pairwise(stamps))


def child_rate(sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """Multiply-adds a second of the conjugate-gradient loop, and of the best large product."""
    generator = torch.Generator().manual_seed(0)
    n, p, d, m, r = sizes.n, sizes.p, sizes.d, sizes.m, sizes.r
    X = torch.randn(n, p, d, generator=generator)
    dtype = curvature_dtype(options.dtype, X)
    atoms = Atoms(torch.randn(m, r, d, generator=generator) / 4, torch.rand(n, m, generator=generator) / m)
    state: AMState = start_state(X, atoms, StepOptions("silu", lambda_A=1e-4))
    slopes = tangent(atoms.bank, atoms.codes)

    def loop() -> None:
        gauss_newton_direction(
            slopes,
            state.point,
            cg_iterations=8,
            damping=1e-3,
            generator=torch.Generator().manual_seed(0),
            curvature_dtype=dtype,
        )

    left, right = torch.randn(2, LARGE, LARGE, generator=generator).to(dtype)
    peaks = []
    for _ in range(4):
        started = clock(options.threads)
        left @ right
        peaks.append(LARGE**3 / (clock(options.threads) - started))
    each = min(iteration_seconds(loop, lambda: clock(options.threads)) for _ in range(2))
    needed = 3 * n * r * r * d + 4 * n * m * r * d + m * r * d * (r + d)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "rate": needed / each,
        "peak": max(peaks),
        "each": each,
    }


def ask(what: str, sizes: Sizes, options: argparse.Namespace, dtype: str, steps: int) -> Any:
    values = ",".join(str(one) for one in (sizes.n, sizes.p, sizes.d, sizes.m, sizes.r))
    command = [sys.executable, __file__, "--child", what, "--sizes", values, "--dtype", dtype]
    command += ["--threads", str(options.threads), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def slope(sizes: list[int], values: list[float]) -> float:
    """Of log value against log size, by least squares."""
    x = [math.log(one) for one in sizes]
    y = [math.log(one) for one in values]
    centre = sum(x) / len(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)


def doubled() -> dict[tuple[str, int], Sizes]:
    """BASE with one of its sizes once, twice and four times as large, in an order in which a slow minute of the machine
    falls on every size alike."""
    return {(key, factor): Sizes(**BASE | {key: BASE[key] * factor}) for factor in (1, 2, 4) for key in BASE}


def doublings(options: argparse.Namespace) -> None:
    print(
        f"\nDoublings from {', '.join(f'{key}={value}' for key, value in BASE.items())}; float32, "
        f"{ITERATIONS} iterations a step, dense atoms, SiLU\n\n"
        "| size | s/step at x1, x2, x4 | exponent | counted | MiB at x1, x2, x4 | exponent | counted |\n"
        + "|---" * 7
        + "|"
    )
    sizes = doubled()
    found = {at: ask("fit", one, options, "same", 5) for at, one in sizes.items()}
    for key in BASE:
        row = [(key, factor) for factor in (1, 2, 4)]
        lengths = [BASE[key] * factor for factor in (1, 2, 4)]
        seconds, memory = ([found[at][what] for at in row] for what in ("seconds", "bytes"))
        work = [step_work(sizes[at], cg_iterations=ITERATIONS) for at in row]
        counted = [fit_bytes(sizes[at], itemsize=4, source_itemsize=4) for at in row]
        print(
            f"| {key} | {', '.join(f'{one:.3f}' for one in seconds)} | {slope(lengths, seconds):.2f} "
            f"| {slope(lengths, work):.2f} | {', '.join(f'{one / 2**20:.0f}' for one in memory)} "
            f"| {slope(lengths, memory):.2f} | {slope(lengths, [float(one) for one in counted]):.2f} |",
            flush=True,
        )


def shapes(options: argparse.Namespace) -> bool:
    """Both tables; whether memory and rates are within what was asked."""
    fine = True
    sizes = [
        Sizes(n, p, d, n // 4, p // 2) for n, p, d in (map(int, one.split("x")) for one in options.shapes)
    ]
    print(
        "\nReal shapes, m = n/4, r = p/2\n\n"
        "| n x p x d | family, MiB | peak of the fit, GiB | families | counted | s/step | RelFrob, start -> "
        f"{options.steps} steps |\n" + "|---" * 7 + "|"
    )
    for one in sizes:
        found = ask("fit", one, options, "auto", options.steps)
        family = one.n * one.p * one.d * 4
        counted = fit_bytes(one, itemsize=4, source_itemsize=4)
        fine &= found["bytes"] <= options.limit * 2**30
        print(
            f"| {one.n} x {one.p} x {one.d} | {family / 2**20:.0f} | {found['bytes'] / 2**30:.2f} "
            f"| {found['bytes'] / family:.2f} | {counted / family:.2f} | {found['seconds']:.1f} "
            f"| {found['before']:.4f} -> {found['after']:.4f} |",
            flush=True,
        )
    print(
        "\nThe conjugate-gradient loop\n\n"
        f"| n x p x d | dtype | s/iteration | GFLOP/s | of a {LARGE}^3 product | share |\n" + "|---" * 6 + "|"
    )
    for one in sizes:
        for dtype in ("same", "bfloat16"):
            found = ask("rate", one, options, dtype, 1)
            share = found["rate"] / found["peak"]
            fine &= share >= options.share or dtype != "same"
            print(
                f"| {one.n} x {one.p} x {one.d} | {found['dtype']} | {found['each']:.2f} "
                f"| {2 * found['rate'] / 1e9:.0f} | {2 * found['peak'] / 1e9:.0f} | {share:.2f} |",
                flush=True,
            )
    return fine


def reach(options: argparse.Namespace) -> None:
    n, p, d = map(int, options.reach.split("x"))
    traces = {
        dtype: ask("reach", Sizes(n, p, d, n // 4, p // 2), options, dtype, 40) for dtype in ("same", "auto")
    }
    goal = REACHED * traces["same"][-1][1]
    print(
        f"\nSeconds to a RelFrob of {goal:.4f} on {options.reach}, m = n/4, r = p/2, SiLU\n\n"
        "| curvature_dtype | RelFrob after 40 steps | s, 40 steps | s to within 2 % |\n" + "|---" * 4 + "|"
    )
    for dtype, trace in traces.items():
        reached = next((f"{seconds:.0f}" for seconds, error in trace if error <= goal), "not reached")
        print(f"| {dtype} | {trace[-1][1]:.4f} | {trace[-1][0]:.0f} | {reached} |", flush=True)


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.child:
        n, p, d, m, r = map(int, options.sizes.split(","))
        work = {"fit": child_fit, "rate": child_rate, "reach": child_reach}[options.child]
        with torch.no_grad():
            print(json.dumps(work(Sizes(n, p, d, m, r), options)))
        return 0
    kind = "CPU" if options.threads == 1 else "wall-clock"
    print(
        f"{options.threads} thread(s) of {platform.machine()}, PyTorch {torch.__version__}, {kind} seconds, load "
        f"{os.getloadavg()[0]:.1f} at the start"
    )
    if options.only in (None, "doublings"):
        doublings(options)
    if options.only in (None, "reach"):
        reach(options)
    fine = options.only not in (None, "shapes") or shapes(options)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
