"""Combinations of options and of awkward weights: is every fit finite, and does its objective fall?

    python experiments/torture/combinations.py                 # all 540 combinations, two minutes
    python experiments/torture/combinations.py --every 7       # each seventh of them

Each is a short fit of 7 experts of 13 x 19. Held: every figure and factor is finite, and where the schedule stands
still (the Gauss-Newton step, no support that shrinks) no step raises the objective by more than rounding.
Prints a table of tried and held; the exit code is 1 if one was not held.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from globe.am.loop import fit_bank
from globe.am.records import Sizes, StepRecord
from globe.config.composition import register, to_config
from globe.config.schema import Config
from globe.errors import GlobeError
from globe.fit.options import fit_options

N, P, D, STEPS = 7, 13, 19, 6
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}


def weights(kind: str, dtype: torch.dtype) -> Tensor:
    """Experts of one kind, of unit deviation where they have any."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(N, P, D, generator=generator, dtype=torch.float64)
    match kind:
        case "steep":
            X = X * torch.logspace(0, -5, D, dtype=torch.float64)
        case "equal":
            X = X[:1].expand(N, P, D).clone()
        case "rank two":
            X = X[..., :2] @ torch.randn(N, 2, D, generator=generator, dtype=torch.float64)
        case "one large":
            X[0] *= 1e4
        case "tiny":
            X = X * 1e-20
    return X.to(dtype)


def composed(words: list[str]) -> Config:
    from hydra import compose, initialize_config_dir

    from globe.config.composition import conf_dir

    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return to_config(compose("config", overrides=words))


AXES: dict[str, tuple[tuple[str, ...], ...]] = {
    "phi": (("bank.activation=identity",), ("bank.activation=silu",), ("bank.activation=tanh",)),
    "ridge": (("train.lambda_A=0",), ("train.lambda_A=1e-4",), ("train.lambda_A=1e-1",)),
    "codes": ((), ("codes.target_support=2",)),
    "step": ((), ("train.dictionary=mod",)),
}
WEIGHTS = ("plain", "steep", "equal", "rank two", "one large")
ATOMS = ((3, 5, None), (5, 6, 2), (1, 8, None), (7, 13, 3))


def fault(config: Config, X: Tensor, atoms: tuple[int, int, int | None]) -> str | None:
    """What one fit does wrong; None if nothing."""
    m, r, k = atoms
    records: list[StepRecord] = []
    sizes = Sizes(N, P, D, m=m, r=r, atom_rank=k, target_support=config.codes.target_support)
    try:
        result = fit_bank(
            X, sizes, fit_options(config), generator=torch.Generator().manual_seed(1), on_step=records.append
        )
    except GlobeError as error:
        return f"refused: {error}"
    tensors = [one for one in result.factors if isinstance(one, Tensor)]
    if not all(bool(torch.isfinite(one).all()) for one in tensors) or not math.isfinite(result.relfrob):
        return "not finite"
    slack = ROUNDING[X.dtype]
    descends = config.train.dictionary == "gauss_newton" and config.codes.target_support is None
    for before, after in itertools.pairwise(records):
        if descends and after.objective > before.objective * (1 + slack) + slack * slack:
            return f"rose at step {after.step}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="try each so many-th combination")
    options = parser.parse_args()
    register()
    torch.set_num_threads(1)
    choices = list(itertools.product(*AXES.values()))
    tried, held = Counter[str](), Counter[str]()
    configs: dict[tuple[tuple[str, ...], ...], Config] = {}
    cases: list[tuple[tuple[tuple[str, ...], ...], str, tuple[int, int, int | None], torch.dtype]] = [
        (words, kind, atoms, (torch.float32, torch.float64)[number % 2])
        for number, (words, kind, atoms) in enumerate(itertools.product(choices, WEIGHTS, ATOMS))
        if atoms[2] is None
        or "mod" not in str(words)  # MOD has dense atoms only, and the configuration says so
    ]
    for words, kind, atoms, dtype in cases[:: options.every]:
        if words not in configs:
            flat = [word for group in words for word in group]
            configs[words] = composed(["train.patience=0", f"train.steps={STEPS}", *flat])
        names = [kind, str(dtype).removeprefix("torch."), f"m={atoms[0]} r={atoms[1]} k={atoms[2]}"]
        names += [word for group in words for word in group] or ["defaults"]
        wrong = fault(configs[words], weights(kind, dtype), atoms)
        for name in ["all", *names]:
            tried[name] += 1
            held[name] += wrong is None
        if wrong:
            print(f"{', '.join(names)}: {wrong}")
    show(tried, held)
    sys.exit(held["all"] < tried["all"])


def show(tried: Counter[str], held: Counter[str], say: Callable[[str], None] = print) -> None:
    say("| fits with | tried | held |\n|---|---|---|")
    for name, count in tried.items():
        say(f"| {name} | {count} | {held[name]} |")


if __name__ == "__main__":
    main()
