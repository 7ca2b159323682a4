"""Does a fit find the floor where it is known? Experts made from a bank, plus noise.

    python experiments/bench/planted.py                    # four forms, two levels of noise, five seeds; five minutes

The floor is the error of the bank that made the experts, after its own refit of the adapters: no fit has to get below
it, though a fit may, by as much as it follows the noise. A form counts by the best of --starts seeds, as one who knows
the floor would run it. Default options but for --steps; the ridge is off, since these problems are exact but for noise.
Exit code 1 if a form ends more than --within above its floor, or the objective rises at an accepted step.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.objective import error_at
from globe.am.records import Sizes, StepOptions, StepRecord
from globe.config.choices import Activation, FirstCodes, Seeding
from globe.config.fit_options import CurveConfig
from globe.config.schema import Config, InitConfig
from globe.fit.options import fit_options
from globe.numerics.activation import phi
from globe.numerics.figures import squared_norms

FORMS = ("linear", "silu", "tanh", "silu, low-rank")


class Planted(NamedTuple):
    X: Tensor
    sizes: Sizes
    floor: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=int, nargs=5, default=[40, 48, 64, 6, 20], metavar=("n", "p", "d", "m", "r")
    )
    parser.add_argument("--noise", type=float, nargs="+", default=[0.1, 0.4])
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--within", type=float, default=0.01)
    parser.add_argument("--seeding", default=str(InitConfig().seeding))
    parser.add_argument("--codes", default=str(InitConfig().codes))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    return parser.parse_args()


def plant(form: str, noise: float, shape: list[int]) -> Planted:
    """Gaussian factors with mixed bases and experts of unit deviation, and noise of a given one."""
    n, p, d, m, r = shape
    k = r // 5 if "low-rank" in form else None
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(m, r, d, generator=generator)
    if k is not None:
        bank = torch.randn(m, r, k, generator=generator) @ torch.randn(m, k, d, generator=generator)
    codes = torch.randn(n, m, generator=generator).abs()
    codes /= torch.einsum("ij,jrd->ird", codes, bank).std()
    lam, activation = form_of(form)
    bases = phi(torch.einsum("ij,jrd->ird", codes, bank), lam=lam, activation=activation)
    X = torch.randn(n, p, r, generator=generator) @ bases
    X = X / X.std() + noise * torch.randn(n, p, d, generator=generator)
    X /= X.std()
    left = error_at(X, bank, codes, StepOptions(lam=lam, activation=activation))
    return Planted(X, Sizes(n, p, d, m, r, atom_rank=k), (left / float(squared_norms(X).sum())) ** 0.5)


def form_of(form: str) -> tuple[float, str]:
    return float("linear" not in form), "tanh" if "tanh" in form else "silu"


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    print(
        f"One thread of {platform.machine()}, PyTorch {torch.__version__}, load {os.getloadavg()[0]:.1f} at the start; "
        f"n, p, d, m, r = {', '.join(map(str, options.shape))}\n\n"
        "| form | noise | floor | best of starts | over the floor | starts within | rises |\n"
        + "|---" * 7
        + "|"
    )
    fine = True
    for form in options.forms:
        for noise in options.noise:
            X, sizes, floor = plant(form, noise, options.shape)
            lam, activation = form_of(form)
            config = Config(init=InitConfig(Seeding(options.seeding), FirstCodes(options.codes)))
            config.train.steps, config.train.patience, config.train.lambda_A = options.steps, 0, 0.0
            config.bank.activation = Activation(activation)
            config.schedule.lam = CurveConfig(start=lam, end=lam)
            ends, rises = [], 0
            for seed in range(options.starts):
                records: list[StepRecord] = []
                result = fit_bank(
                    X,
                    sizes,
                    fit_options(config),
                    generator=torch.Generator().manual_seed(seed),
                    on_step=records.append,
                )
                ends.append(result.relfrob)
                rises += sum(after.objective > before.objective for before, after in pairwise(records))
            over = min(ends) / floor - 1
            within = sum(end <= (1 + options.within) * floor for end in ends)
            fine &= over <= options.within and rises == 0
            print(
                f"| {form} | {noise:g} | {floor:.4f} | {min(ends):.4f} | {100 * over:+.2f} % "
                f"| {within} of {options.starts} | {rises} |",
                flush=True,
            )
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
