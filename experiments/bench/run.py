"""The two dictionary steps against the closed forms, at the same kept parameters: `make bench`.

    python experiments/bench/run.py [CHECKPOINT] --layer 1 --family up --m 15 --r 88 --steps 60

Every fit starts from the same seeded atoms and codes. RelFrob is that of the last step, on the z-scored experts in
float32; the ratio is to the better closed form of the same budget. Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import Sizes, StepRecord
from globe.baselines import resolve_sizes, run_baseline
from globe.checkpoint import open_checkpoint
from globe.config.choices import Activation, Dictionary, Method
from globe.config.fit_options import CurveConfig
from globe.config.schema import Config
from globe.errors import GlobeError
from globe.fit.normalise import normalise
from globe.fit.options import fit_options

_DEFAULT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "globe-ref"


class Row(NamedTuple):
    name: str
    sizes: str
    kept: float
    relfrob: float
    steps: int
    rises: int
    seconds: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", nargs="?", help="folder or hub id; left out, globe-ref beside the project"
    )
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--family", default="up", choices=("up", "gate"))
    parser.add_argument("--m", type=int, default=15)
    parser.add_argument("--r", type=int, default=88)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def closed_form(method: Method, X: Tensor, budget: int) -> Row:
    start, (n, p, d) = time.process_time(), X.shape
    result = run_baseline(X, resolve_sizes(method, n=n, p=p, d=d, budget=budget))
    sizes = f"m={result.sizes.m} r={result.sizes.r}"
    return Row(str(method), sizes, result.kept, result.relfrob, 0, 0, time.process_time() - start)


def fit(
    X: Tensor, options: argparse.Namespace, dictionary: Dictionary, lam: float, activation: Activation
) -> Row:
    config = Config()
    config.train.steps, config.train.patience, config.train.dictionary = options.steps, 0, dictionary
    config.bank.activation = activation
    config.schedule.lam = CurveConfig(start=lam, end=lam)
    sizes = Sizes(*X.shape, options.m, options.r)
    records: list[StepRecord] = []
    start = time.process_time()
    result = fit_bank(
        X,
        sizes,
        fit_options(config),
        generator=torch.Generator().manual_seed(options.seed),
        on_step=records.append,
    )
    seconds = time.process_time() - start
    objectives = [record.objective for record in records if record.accepted]
    rises = sum(b > a for a, b in pairwise(objectives))
    name = f"dictionary={dictionary}, " + ("linear" if lam == 0 else str(activation))
    return Row(name, f"m={sizes.m} r={sizes.r}", sizes.kept, result.relfrob, result.steps, rises, seconds)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.checkpoint or str(_DEFAULT))
    W = checkpoint.read_experts(options.layer, options.family).weights
    X = normalise(W, centre="scalar", scale="family").experts
    budget = Sizes(*X.shape, options.m, options.r).parameters
    print(
        f"{checkpoint.folder.name}, layer {options.layer}, {options.family}: {' x '.join(map(str, X.shape))}; "
        f"{options.threads} thread(s) of {platform.machine()}, PyTorch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f} at the start\n"
    )
    print("| method | sizes | kept | RelFrob | ratio | steps | rises of the objective | CPU seconds |")
    print("|---|---|---|---|---|---|---|---|")
    rows = [closed_form(method, X, budget) for method in (Method.svd, Method.shared_basis)]
    best = min(row.relfrob for row in rows)
    runs = (
        (Dictionary.mod, 0.0, Activation.silu),
        (Dictionary.gauss_newton, 0.0, Activation.silu),
        (Dictionary.gauss_newton, 1.0, Activation.silu),
        (Dictionary.gauss_newton, 1.0, Activation.tanh),
    )
    for row in rows:
        show(row, best)
    for dictionary, lam, activation in runs:
        show(fit(X, options, dictionary, lam, activation), best)


def show(row: Row, best: float) -> None:
    steps = (str(row.steps), str(row.rises)) if row.steps else ("", "")
    cells = (
        row.name,
        row.sizes,
        f"{row.kept:.4f}",
        f"{row.relfrob:.4f}",
        f"{row.relfrob / best:.3f}",
        *steps,
    )
    print("| " + " | ".join(cells) + f" | {row.seconds:.1f} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except GlobeError as error:
        sys.exit(f"{error}")
