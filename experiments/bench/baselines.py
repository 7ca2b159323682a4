"""All baselines on one layer and family of a checkpoint at one budget: a table, on one command.

    python experiments/bench/baselines.py CHECKPOINT --layer 1 --family up --m 15 --r 88 --seconds 30 60 120
    python experiments/bench/baselines.py CHECKPOINT --layer 1 --family up --kept 0.47 --seconds 60

The budget is a kept share of the family's parameters, or what a bank of m atoms with r rows keeps; then MoBE and
the group SVD have exactly those m and r. Errors at a time are the best measured until then. SLBF's cosine ends
with its time, so SLBF runs once per time. `+refit` is the last state with its adapters refitted by least squares, a
variant that nobody published.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globe.am.refit import refit
from globe.bank.compose import factor_bases
from globe.baselines import BaselineResult, BaselineSizes, Limits, resolve_sizes, run_baseline
from globe.checkpoint import open_checkpoint
from globe.config.choices import ADAM_METHODS, WEIGHT_METHODS, Method
from globe.errors import ConfigError, GlobeError
from globe.fit.normalise import normalise
from globe.numerics.figures import relfrob, squared_errors, squared_norms


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="folder or hub id; left out, the embedded model")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--family", default="up", choices=("up", "gate", "down"))
    parser.add_argument("--kept", type=float, help="share of the family's parameters to keep at most")
    parser.add_argument(
        "--m", type=int, help="atoms of the banks; with --r it sets the budget where --kept is left out"
    )
    parser.add_argument("--r", type=int, help="rows of an atom, of the banks and of SLBF")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[30.0, 60.0], help="times to report, ascending"
    )
    measured = [one for one in Method if one is not Method.globe and one not in WEIGHT_METHODS]
    parser.add_argument("--methods", nargs="+", type=Method, default=measured, choices=measured)
    parser.add_argument(
        "--activations", nargs="+", default=["silu", "tanh"], choices=("silu", "tanh", "identity")
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds (one thread, shared machine)"
    )
    parser.add_argument("--json", help="also write every measured state to this file")
    options = parser.parse_args()
    if options.kept is None and (options.m is None or options.r is None):
        parser.error("give --kept, or both --m and --r")
    options.seconds = sorted(options.seconds)
    return options


def sizes_of(method: Method, options: argparse.Namespace, n: int, p: int, d: int) -> BaselineSizes:
    """The sizes that a method has within the budget: every method takes what is its own."""
    given = options.kept
    if given is None:
        given = BaselineSizes(Method.mobe, n, p, d, options.m, options.r).parameters
    own: dict[str, Any] = {"budget": given}
    if method in (Method.group_svd, Method.mobe, Method.mobe_corrected):
        own |= {"m": options.m, "r": options.r}
    elif method is Method.slbf:
        own["r"] = options.r
    return resolve_sizes(method, n=n, p=p, d=d, **own)


def fit(
    method: Method, activation: str, limit: float, options: argparse.Namespace, X: Tensor, std: float
) -> BaselineResult:
    return run_baseline(
        X,
        sizes_of(method, options, *X.shape),
        Limits(seconds=limit, clock=time.process_time if options.cpu_time else time.perf_counter),
        activation=activation,
        weights_std=std,
        generator=torch.Generator().manual_seed(options.seed),
    )


def row(results: list[BaselineResult], name: str, X: Tensor, seconds: list[float]) -> str:
    """One line of the table from one fit, or from one fit per time."""
    last = results[-1]
    sizes = last.sizes
    shape = f"m={sizes.m} r={sizes.r}" + (f" k={sizes.atom_rank}" if sizes.atom_rank else "")
    if len(results) > 1:
        errors = [f"{result.relfrob:.4f}" for result in results]
    else:
        errors = [best_until(last, time) for time in seconds]
    cells = [name, shape, f"{last.kept:.4f}", *errors, f"{last.seconds:.1f}"]
    if last.steps:
        pace = 1000 * (last.seconds - last.history[0].seconds) / last.steps
        cells += [f"{refitted_error(last, X):.4f}", str(last.steps), f"{pace:.1f}"]
    else:
        cells += ["", "", ""]
    return "| " + " | ".join(cells) + " |"


def refitted_error(result: BaselineResult, X: Tensor) -> float:
    """RelFrob with the best adapters for the bases that an iteration ended with."""
    bases = factor_bases(result.factors, lam=result.lam, activation=result.activation)
    return relfrob(squared_errors(X, refit(X, bases).adapters, bases), squared_norms(X))


def best_until(result: BaselineResult, seconds: float) -> str:
    """Least measured error until then; a last step may end a little late."""
    errors = [point.relfrob for point in result.history if point.seconds <= 1.02 * seconds + 0.1]
    return f"{min(errors):.4f}" if errors else "-"


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    W = open_checkpoint(options.checkpoint).read_experts(options.layer, options.family).weights
    normalised = normalise(W, centre="scalar", scale="family")
    assert normalised.scale is not None
    X, std = normalised.experts, normalised.scale.item()
    n, p, d = X.shape
    name = Path(options.checkpoint).name if options.checkpoint else "embedded model"
    print(
        f"{name}, layer {options.layer}, {options.family}: {n} x {p} x {d}; {options.threads} thread(s) of "
        f"{platform.machine()}, PyTorch {torch.__version__}, {'CPU' if options.cpu_time else 'wall-clock'} seconds, "
        f"load {os.getloadavg()[0]:.1f} at the start\n"
    )
    times = [f"{time:g} s" for time in options.seconds]
    head = ["method", "sizes", "kept", *times, "seconds", "+refit", "steps", "ms/step"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    record = []
    for method in options.methods:
        for activation in options.activations if method in ADAM_METHODS else [""]:
            label = f"{method} {activation}".strip()
            # a cosine over the time has one end: an error on its way says nothing about an earlier end
            limits = options.seconds if method is Method.slbf else options.seconds[-1:]
            try:
                results = [fit(method, activation or "identity", limit, options, X, std) for limit in limits]
            except ConfigError as error:
                print(f"| {label} | {error} |" + " |" * (len(head) - 2), flush=True)
                continue
            print(row(results, label, X, options.seconds), flush=True)
            record += [
                {"label": label, "limit": limit} | plain(one)
                for limit, one in zip(limits, results, strict=True)
            ]
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1), encoding="utf-8")


def plain(result: BaselineResult) -> dict[str, Any]:
    return {
        "sizes": asdict(result.sizes),
        "kept": result.kept,
        "relfrob": result.relfrob,
        "stop": str(result.stop),
        "history": [list(point) for point in result.history],
    }


if __name__ == "__main__":
    try:
        main()
    except GlobeError as error:
        sys.exit(f"{error}")
