"""Does a fit that begins on a part of the columns and grows reach its error sooner?

    python experiments/bench/growing.py                       # three minutes
    python experiments/bench/growing.py --shape 16x352x512 --steps 40 --plans 256:10 256:18 384:12

A plan 256:10 fits the bank to 256 random columns for 10 steps, gives the atoms their other columns by least squares to
what the adapters leave them to be, and fits all columns for the rest of the steps. Seconds are of the processor. The
whole fit's own error after all steps, and within 2 % of it, is what is to be reached. A part has at least r columns:
with fewer, every expert would be exact.
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float
from scale import trained_like
from torch import Tensor

from globe.am import loop
from globe.am.records import FitResult, Sizes
from globe.am.state import Atoms
from globe.config.choices import Activation
from globe.config.schema import Config
from globe.fit.normalise import normalise
from globe.fit.options import fit_options


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="16x352x512")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--plans", nargs="+", default=["256:10", "256:18", "384:12"])
    return parser.parse_args()


def fit(
    X: Float[Tensor, "n p d"], steps: int, atoms: Atoms | None = None
) -> tuple[FitResult, list[tuple[float, float]]]:
    """Return a fit of tanh bases, m = n/4, r = p/2, from `atoms` if given, and its seconds and errors step by step."""
    n, p, d = X.shape
    config = Config()
    config.train.steps, config.train.patience, config.bank.activation = steps, 0, Activation.tanh
    records: list[tuple[float, float]] = []
    started = time.process_time()

    def first(*given: Any, **options: Any) -> Atoms:
        return original(*given, **options) if atoms is None else atoms

    original = loop.first_atoms
    with patch.object(loop, "first_atoms", first):
        result = loop.fit_bank(
            X,
            Sizes(n, p, d, n // 4, p // 2),
            fit_options(config),
            generator=torch.Generator().manual_seed(0),
            on_step=lambda record: records.append((time.process_time() - started, record.relfrob)),
        )
    return result, records


def grown(result: FitResult, rest: Float[Tensor, "n p c"]) -> Atoms:
    """Return the atoms of a fit to some columns, with the others appended: phi^-1 of A_i^+ X_i, shared out by codes."""
    found = result.factors
    bases = torch.linalg.lstsq(found.adapters, rest).solution.clamp(-0.99, 0.99).atanh()
    bank = torch.linalg.lstsq(found.codes, bases.flatten(1)).solution
    return Atoms(torch.cat([found.bank, bank.view(*found.bank.shape[:2], -1)], dim=2), found.codes)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    n, p, d = map(int, options.shape.split("x"))
    X = normalise(trained_like(n, p, d), centre="scalar", scale="family").experts
    _, whole = fit(X, options.steps)
    goal = 1.02 * whole[-1][1]
    print("| columns:steps | RelFrob at the end | seconds | seconds to within 2 % |\n|---|---|---|---|")
    print(line("all", whole, 0.0, goal), flush=True)
    order = torch.randperm(d, generator=torch.Generator().manual_seed(1))
    for plan in options.plans:
        columns, steps = map(int, plan.split(":"))
        part, trace = fit(X[:, :, order[:columns]].contiguous(), steps)
        started = time.process_time()
        atoms = grown(part, X[:, :, order[columns:]])
        before = trace[-1][0] + time.process_time() - started
        _, trace = fit(X[:, :, order].contiguous(), options.steps - steps, atoms)
        print(line(plan, trace, before, goal), flush=True)


def line(name: str, trace: list[tuple[float, float]], before: float, goal: float) -> str:
    reached = next((f"{before + seconds:.1f}" for seconds, error in trace if error <= goal), "not reached")
    return f"| {name} | {trace[-1][1]:.4f} | {before + trace[-1][0]:.1f} | {reached} |"


if __name__ == "__main__":
    with torch.no_grad():
        main()
